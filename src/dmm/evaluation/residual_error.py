"""Fidelity of merged ControlNets: how far what each control gives to the UNet is from what its teacher gives.

For every control and every residual, over held-out latents noised at uniform timesteps,

    sum ||student - teacher||^2 / sum ||teacher||^2,

and the mean over the residuals: 0 for a student that gives what its teacher gives, 1 for one that gives nothing. The
same of the UNet's prediction, relative to how far the teacher's residuals move it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmm.data import TrainingData
from dmm.data.training import STUDENT
from dmm.families import arguments
from dmm.maths.diffusion import add_noise
from dmm.maths.draws import draw
from dmm.pipeline.controls import temporary_control


@dataclass(frozen=True)
class ResidualError:
    """Of one control.

    Attributes:
        by_block: of each residual, from the first to the middle block's.
        prediction: of what the UNet predicts with them.
    """

    by_block: list[float]
    prediction: float

    @property
    def mean(self) -> float:
        """Over the residuals."""
        return sum(self.by_block) / len(self.by_block)


@torch.no_grad()
def residual_errors(
    student: Any,
    teachers: Mapping[str, Any],
    denoiser: Any,
    data: TrainingData,
    alphas_cumprod: Tensor,
    *,
    num_draws: int = 1024,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, ResidualError]:
    """Measure a merged ControlNet against its teachers.

    Args:
        student: with controls; the one that is set is set again afterwards.
        teachers: stock ControlNets by control. All are on the denoiser's device and in its dtype.
        denoiser: that they guide.
        data: latents, captions, and what each control is shown.
        alphas_cumprod: (T,), of the denoiser.
        num_draws: of noise and timesteps, for each control the same.
        seed: of these.
        batch_size: samples at a time.
    """
    batches = [range(num_draws)[start : start + batch_size] for start in range(0, num_draws, batch_size)]
    return {
        name: _error_of(student, teacher, denoiser, _Draws(data, name, alphas_cumprod, seed), batches)
        for name, teacher in teachers.items()
    }


@dataclass(frozen=True)
class _Draws:
    """Noised samples of one control."""

    data: TrainingData
    control: str
    alphas_cumprod: Tensor
    seed: int

    def noised(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x_t (B, C, H, W), timesteps (B,), and what a ControlNet reads."""
        drawn = draw(
            self.seed,
            0,
            indices,
            num_rows=self.data.num_rows,
            num_own=[[()]] * len(indices),
            own=(),
            latent_shape=self.data.latent_shape,
            num_timesteps=len(self.alphas_cumprod),
            caption_dropout=0.0,
        )
        x_t = add_noise(self.data.latents(drawn.rows), drawn.noise, self.alphas_cumprod[drawn.timesteps])
        read = self.data.conditioning(STUDENT, drawn.rows, drawn.dropped)
        return x_t, drawn.timesteps, read | self.data.shown(drawn.rows, [self.control] * len(indices))


def _error_of(student: Any, teacher: Any, denoiser: Any, draws: _Draws, batches: Sequence[range]) -> ResidualError:
    sums: list[Tensor] = []
    for batch in batches:
        x_t, timesteps, read = draws.noised(batch)
        x_t, timesteps = x_t.to(denoiser.device, denoiser.dtype), timesteps.to(denoiser.device)
        given = arguments({name: value.to(denoiser.device) for name, value in read.items()}, denoiser.dtype)
        theirs = _residuals(teacher, x_t, timesteps, given)
        with temporary_control(student, draws.control):
            ours = _residuals(student, x_t, timesteps, given)
        given.pop("controlnet_cond")
        moved, predicted, plain = (
            denoiser(
                x_t,
                timesteps,
                **given,
                down_block_additional_residuals=blocks[:-1],
                mid_block_additional_residual=blocks[-1],
                return_dict=False,
            )[0]
            for blocks in (theirs, ours, [torch.zeros_like(block) for block in theirs])
        )
        pairs = [*zip(ours, theirs, strict=True), (predicted - plain, moved - plain)]
        sums.append(torch.stack([torch.stack([_power(a - b), _power(b)]) for a, b in pairs]))
    errors, sizes = torch.stack(sums).sum(0).unbind(1)
    relative = (errors / sizes).tolist()
    return ResidualError(relative[:-1], relative[-1])


def _residuals(net: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> list[Tensor]:
    down, middle = net(x_t, timesteps, **given, return_dict=False)
    return [*down, middle]


def _power(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum().cpu()
