"""The outputs of a denoiser's blocks, caught as they pass: what feature imitation compares (DMM eq. 10)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dmm.families import anatomy_of
from dmm.families.anatomy import Block


class BlockTap:
    """Hooks on the blocks of a denoiser: of a UNet every down block, the mid block and every up block.

    Args:
        denoiser: of any family, or a ControlNet.
    """

    def __init__(self, denoiser: Any) -> None:
        self._caught: dict[str, Tensor] | None = None
        for name, block in anatomy_of(denoiser).blocks(denoiser).items():
            block.module.register_forward_hook(self._hook(name, block))

    @contextmanager
    def catch(self) -> Iterator[Mapping[str, Tensor]]:
        """Within the block, a call of the denoiser fills the mapping: block name to what is the picture's, (B, ...)."""
        caught: dict[str, Tensor] = {}
        self._caught = caught
        try:
            yield caught
        finally:
            self._caught = None

    def _hook(self, name: str, block: Block) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._caught is not None:
                self._caught[name] = block.pick(output)

        return hook
