"""The outputs of a UNet's blocks, caught as they pass: what feature imitation compares (DMM eq. 10)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class BlockTap:
    """Hooks on every down block, the mid block and every up block of a UNet.

    Args:
        unet: a diffusers UNet with ``down_blocks``, ``mid_block`` and ``up_blocks``.
    """

    def __init__(self, unet: Any) -> None:
        self._caught: dict[str, Tensor] | None = None
        for name, block in unet_blocks(unet).items():
            block.register_forward_hook(self._hook(name))

    @contextmanager
    def catch(self) -> Iterator[Mapping[str, Tensor]]:
        """Within the block, a call of the UNet fills the mapping: block name to output, (B, C, H, W)."""
        caught: dict[str, Tensor] = {}
        self._caught = caught
        try:
            yield caught
        finally:
            self._caught = None

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._caught is not None:
                # down blocks also return what the skip connections carry
                self._caught[name] = output[0] if isinstance(output, tuple) else output

        return hook


def unet_blocks(unet: Any) -> dict[str, nn.Module]:
    """Every down block, the mid block and every up block, by name; a ControlNet has no up blocks."""
    blocks: dict[str, nn.Module] = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks["mid_block"] = unet.mid_block
    blocks |= {f"up_blocks.{i}": block for i, block in enumerate(getattr(unet, "up_blocks", ()))}
    return blocks
