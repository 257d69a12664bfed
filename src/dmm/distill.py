"""One step of distillation: what the teachers say of a batch, what the student says, and how far apart they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dmm.diffusion import PredictionType, convert_prediction
from dmm.features import BlockTap
from dmm.losses import feature_loss, score_loss


@dataclass(frozen=True)
class Part:
    """Some neighbouring samples of a batch, and their teacher.

    Attributes:
        teacher: its index, which is its style's too.
        samples: their place in the batch.
        conditioning: keyword arguments of the teacher's UNet for these samples.
    """

    teacher: int
    samples: slice
    conditioning: Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """B noised samples, ordered by teacher.

    Attributes:
        x_t: (B, C, H, W).
        timesteps: (B,).
        alpha_bar_t: (B,), signal power at the timesteps.
        style_weights: (B, N).
        conditioning: keyword arguments of the student's UNet.
        loss_weights: (B,), by which the samples' losses are summed.
        parts: which cover the batch.
    """

    x_t: Tensor
    timesteps: Tensor
    alpha_bar_t: Tensor
    style_weights: Tensor
    conditioning: Mapping[str, Tensor]
    loss_weights: Tensor
    parts: Sequence[Part]


class Teacher:
    """A frozen UNet whose predictions and features the student learns.

    Args:
        unet: frozen, in ``eval``.
        prediction_type: what it predicts.
        student_prediction_type: what the student predicts. Where the two differ, the teacher's last up block is not
            imitated: its output is on the way to another target.
    """

    def __init__(
        self, unet: nn.Module, prediction_type: PredictionType, student_prediction_type: PredictionType
    ) -> None:
        self.unet = unet
        self._types = (prediction_type, student_prediction_type)
        self._tap = BlockTap(unet)

    @torch.no_grad()
    def __call__(
        self, x_t: Tensor, timesteps: Tensor, alpha_bar_t: Tensor, conditioning: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Prediction, in the student's type, and features by block; arguments as in :class:`Batch`."""
        dtype = next(self.unet.parameters()).dtype
        conditioning = {name: value.to(dtype) for name, value in conditioning.items()}
        with self._tap.catch() as features:
            output = self.unet(x_t.to(dtype), timesteps, **conditioning, return_dict=False)[0]
        caught = dict(features)
        if self._types[0] != self._types[1]:
            caught.pop(list(caught)[-1])
        return convert_prediction(output.float(), x_t, alpha_bar_t, *self._types), caught


class Teachers(Protocol):
    """Teachers by index; one that is asked for may be used until the next one is."""

    def __getitem__(self, index: int, /) -> Teacher:
        """Its weights are on the device."""


@dataclass(frozen=True)
class Distillation:
    """The loss of one batch.

    Attributes:
        loss: scalar, to be minimised; it sums, over all batches of a step, to the mean over styles.
        terms: each term's per-sample values, (B,), detached, to be logged.
    """

    loss: Tensor
    terms: dict[str, Tensor]


def distill(student: nn.Module, teachers: Teachers, batch: Batch, *, feature_weight: float) -> Distillation:
    """Compare the student, in each sample's style, with the sample's teacher.

    Args:
        student: a :class:`dmm.student.StyledStudent`, wrapped or not; it runs once over the batch.
        teachers: by index; each runs over its parts.
        feature_weight: lambda_feat; at 0 features are not compared.
    Source: DMM eq. 9, 10 and 13, Algorithm 1 lines 4-14.
    """
    targets = [
        teachers[part.teacher](
            batch.x_t[part.samples], batch.timesteps[part.samples], batch.alpha_bar_t[part.samples], part.conditioning
        )
        for part in batch.parts
    ]
    output = student(batch.x_t, batch.timesteps, batch.conditioning, batch.style_weights)
    terms = {"score": score_loss(output.prediction, torch.cat([prediction for prediction, _ in targets]))}
    if feature_weight:
        terms["feature"] = torch.cat(
            [
                feature_loss({name: value[part.samples] for name, value in output.features.items()}, features)
                for part, (_, features) in zip(batch.parts, targets, strict=True)
            ]
        )
    factors = {"score": 1.0, "feature": feature_weight}
    total = torch.stack([factors[name] * values for name, values in terms.items()]).sum(0)
    return Distillation((total * batch.loss_weights).sum(), {name: values.detach() for name, values in terms.items()})
