"""The lesson of few-step distillation: wherever the student begins, it says what it would say a step further on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmm.maths.consistency import as_noised, clean_and_noise, consistent, guide, sub_path_noise, sub_path_point
from dmm.maths.diffusion import PredictionType, add_noise
from dmm.maths.losses import consistency_loss
from dmm.models.few_step import FewStepStudent
from dmm.training.distill import Distillation
from dmm.training.paths import PathBatch


@dataclass(frozen=True)
class Consistency:
    """SPLAM's lesson, and at a gamma of 1 LCM's.

    SPLAM tells its student gamma by a new layer. Here it is asked as its teacher would be, at the timestep whose noise
    the sub-path's point has: it knows what to say there before it has learnt anything.

    Attributes:
        student: not wrapped, which with its averages is the target.
        teacher: frozen, in ``eval``; the student itself where that has a LoRA, which the teacher does without.
        prediction_type: of both.

    Source: SPLAM (arXiv:2404.13903), whose code has LCM's (arXiv:2310.04378, Algorithm 1).
    """

    student: FewStepStudent
    teacher: FewStepStudent
    prediction_type: PredictionType

    def __call__(self, student: nn.Module, batch: PathBatch, averages: Mapping[str, Tensor], /) -> Distillation:
        """Compare the student, between two points of the teacher's path, with its own average at the second."""
        with torch.no_grad():
            x_s = self._walk(batch)
            target = self._target(batch, x_s, averages)
        x_gamma = sub_path_point(batch.x_t, x_s, batch.gamma, batch.levels, batch.alpha_bar_s)
        noise_power = sub_path_noise(batch.gamma, batch.levels, batch.alpha_bar_s)
        x, level = as_noised(x_gamma, batch.levels, noise_power)
        # last of the three: what styles add to the layers stays for the backward pass
        output = student(x, batch.between, batch.conditioning, batch.style_weights, batch.told)
        x_0, _ = clean_and_noise(output.float(), x, level, self.prediction_type)
        values = consistency_loss(consistent(x_0, x, batch.between), target)
        return Distillation((values * batch.loss_weights).sum(), {"consistency": values.detach()})

    def _walk(self, batch: PathBatch) -> Tensor:
        """A guided step of DDIM by the teacher, from ``x_t`` to s."""
        dtype = next(self.teacher.unet.parameters()).dtype
        both = {
            name: torch.cat([batch.unconditional[name], conditional])
            for name, conditional in batch.conditioning.items()
        }
        doubled = torch.cat([batch.x_t, batch.x_t]).to(dtype)
        timesteps = torch.cat([batch.timesteps, batch.timesteps])
        output = self.teacher(doubled, timesteps, both, batch.style_weights, with_fast=False).float()
        unconditional, conditional = output.chunk(2)
        guided = guide(conditional, unconditional, batch.guidance)
        x_0, noise = clean_and_noise(guided, batch.x_t, batch.levels, self.prediction_type)
        return add_noise(x_0, noise, batch.alpha_bar_s)

    def _target(self, batch: PathBatch, x_s: Tensor, averages: Mapping[str, Tensor]) -> Tensor:
        asked = (x_s, batch.earlier, batch.conditioning, batch.style_weights, batch.told)
        output = functional_call(self.student, dict(averages), asked).float()
        x_0, _ = clean_and_noise(output, x_s, batch.alpha_bar_s, self.prediction_type)
        return consistent(x_0, x_s, batch.earlier)
