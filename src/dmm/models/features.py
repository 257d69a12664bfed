"""The outputs of a denoiser's blocks, caught as they pass: what feature imitation compares (DMM eq. 10)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dmm.families import anatomy_of


class BlockTap:
    """Hooks on the blocks of a denoiser: of a UNet every down block, the mid block and every up block.

    Args:
        denoiser: of any family, or a ControlNet.
    """

    def __init__(self, denoiser: Any) -> None:
        self._outputs: dict[str, Any] | None = None
        self._blocks = anatomy_of(denoiser).blocks(denoiser)
        for name, block in self._blocks.items():
            block.module.register_forward_hook(self._hook(name))

    @contextmanager
    def catch(self) -> Iterator[Mapping[str, Tensor]]:
        """Catch what a call of the denoiser within the block puts out.

        Returns: filled when the block ends: block name to what is the picture's, (B, ...).
        """
        caught: dict[str, Tensor] = {}
        outputs: dict[str, Any] = {}
        self._outputs = outputs
        try:
            yield caught
        finally:
            self._outputs = None
        # not in the hook: gradient checkpointing runs a block again, without it, and counts what was kept
        caught.update({name: self._blocks[name].pick(output) for name, output in outputs.items()})

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._outputs is not None:
                self._outputs[name] = output

        return hook
