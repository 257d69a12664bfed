"""What a ControlNet gives to the UNet, as one vector: what merged ControlNets are compared by.

Each residual is divided by the root of its mean square over the teachers, and counts alike whatever its size: the mean
square of the vector is the mean over blocks of each block's, 1 for teachers on average. Where it is asked for, what
the UNet predicts with the residuals is a further part, relative to how far these move it.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmm.families import arguments


class Residuals:
    """How residuals become a vector.

    Args:
        denoiser: the frozen UNet that they are for, where its prediction counts.
        prediction: the weight of that beside the residuals, which weigh 1 together.

    Attributes:
        powers: mean square of each part over the teachers, by which they are divided; 1 until they are measured.
    """

    def __init__(self, denoiser: nn.Module | None = None, prediction: float = 0.0) -> None:
        self.denoiser = denoiser if prediction else None
        self._prediction = prediction
        self.powers: list[float] = []

    def __deepcopy__(self, _: Any) -> "Residuals":
        return self  # a copy of a ControlNet is compared as it is

    def vector(self, blocks: Sequence[Tensor], x_t: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        """The parts of B samples side by side.

        Args:
            blocks: residuals, (B, C_b, H_b, W_b) each; the middle block's last.
            x_t: (B, C, H, W), noised latents.
            timesteps: (B,).
            conditioning: keyword arguments of the denoiser.
        Returns: (B, E), float32.
        """
        parts = self._parts(blocks, x_t, timesteps, conditioning)
        total = sum(part[0].numel() for part in parts)
        weights = [1 / len(blocks)] * len(blocks) + [self._prediction] * (len(parts) - len(blocks))
        powers = self.powers or [1.0] * len(parts)
        return torch.cat(
            [
                part.flatten(1).float() * math.sqrt(weight * total / (part[0].numel() * power))
                for part, weight, power in zip(parts, weights, powers, strict=True)
            ],
            dim=1,
        )

    def _parts(self, blocks: Sequence[Tensor], x_t: Tensor, timesteps: Tensor, conditioning: Any) -> list[Tensor]:
        if self.denoiser is None:
            return list(blocks)
        dtype = next(self.denoiser.parameters()).dtype
        given = arguments(conditioning, dtype)
        *down, middle = (block.to(dtype) for block in blocks)
        predicted = self.denoiser(
            x_t.to(dtype),
            timesteps,
            **given,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return [*blocks, predicted]

    @torch.no_grad()
    def squares(self, blocks: Sequence[Tensor], x_t: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        """Mean squares of the parts of each sample; of the prediction, of what the residuals change: (B, parts)."""
        parts = self._parts(blocks, x_t, timesteps, conditioning)
        if len(parts) > len(blocks):
            nothing = [torch.zeros_like(block) for block in blocks]
            parts[-1] = parts[-1] - self._parts(nothing, x_t, timesteps, conditioning)[-1]
        return torch.stack([part.flatten(1).float().square().mean(1) for part in parts], dim=1)

    def set_powers(self, squares: Iterable[Tensor]) -> None:
        """Divide by what :meth:`squares` gave of samples, (B, parts) each, from now on."""
        found = torch.cat(list(squares)).double().mean(0)
        # a residual that no teacher gives is compared as it is
        self.powers = [power if power > 0 else 1.0 for power in found.tolist()]


class _Measured:
    """Mixed into a ControlNet's class: its forward returns the vector."""

    residuals: Residuals

    def forward(
        self, sample: Tensor, timestep: Tensor, *, controlnet_cond: Tensor, return_dict: bool = False, **more: Any
    ) -> tuple[Tensor]:
        """One vector, (B, E), whatever ``return_dict`` says."""
        return (self.residuals.vector(self.blocks(sample, timestep, controlnet_cond, **more), sample, timestep, more),)

    def blocks(self, sample: Tensor, timestep: Tensor, controlnet_cond: Tensor, **more: Any) -> list[Tensor]:
        """The residuals, the middle block's last."""
        stock: Any = super()
        down, middle = stock.forward(sample, timestep, controlnet_cond=controlnet_cond, return_dict=False, **more)
        return [*down, middle]


def measured(net: Any, residuals: Residuals) -> Any:
    """Let a ControlNet say its residuals as one vector; its parameters stay as they are. Returns it."""
    kind: Any = type(net)
    net.__class__ = _measured_class(kind)
    net.residuals = residuals
    return net


@functools.cache
def _measured_class(kind: Any) -> Any:
    return kind if issubclass(kind, _Measured) else type(kind.__name__, (_Measured, kind), {})
