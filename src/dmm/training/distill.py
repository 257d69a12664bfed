"""One step of distillation: what the teachers say of a batch, what the student says, and how far apart they are.

The adversary is trained in a second step, on what the first one let it see: Algorithm 1's two updates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmm.families import ask
from dmm.maths.diffusion import PredictionType
from dmm.maths.losses import adversarial_loss, discriminator_loss, feature_loss, score_loss
from dmm.maths.processes import Process
from dmm.maths.schedules import timesteps_of_equal_power
from dmm.models.discriminator import Discriminator
from dmm.models.features import BlockTap
from dmm.models.student import StyledStudent


@dataclass(frozen=True)
class Part:
    """Some neighbouring samples of a batch, and their teacher.

    Attributes:
        teacher: its index.
        samples: their place in the batch.
        conditioning: what the teacher's denoiser reads for these samples, by flat names.
    """

    teacher: int
    samples: slice
    conditioning: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rediffusion:
    """How the clean latents that were predicted of B samples are diffused again.

    Attributes:
        timesteps: (B,), at least those of the batch.
        levels: (B,), of noise there.
        noise: (B, C, H, W).
    """

    timesteps: Tensor
    levels: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Samples:
    """B noised samples.

    Attributes:
        x_t: (B, C, H, W).
        timesteps: (B,).
        levels: (B,), of noise at the timesteps, such as signal power: see :mod:`dmm.maths.processes`.
        style_weights: (B, N).
        conditioning: what the student's denoiser reads, by flat names.
        loss_weights: (B,), by which the samples' losses are summed.
    """

    x_t: Tensor
    timesteps: Tensor
    levels: Tensor
    style_weights: Tensor
    conditioning: Mapping[str, Tensor]
    loss_weights: Tensor


@dataclass(frozen=True)
class Batch(Samples):
    """Samples, ordered by teacher.

    Attributes:
        score_weights: (B,), of their scores beside the other terms.
        parts: which cover the batch.
        process: that noised them.
        again: for the discriminator, where there is one.
    """

    score_weights: Tensor
    parts: Sequence[Part]
    process: Process
    again: Rediffusion | None = None


class Teacher:
    """A frozen denoiser whose predictions and features the student learns.

    Args:
        denoiser: frozen, in ``eval``.
        prediction_type: what it predicts.
        student_prediction_type: what the student predicts. Where the two differ, the teacher's last up block is not
            imitated: its output is on the way to another target.
        alphas_cumprod: (T,), of its noise schedule, where that is not the student's.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        prediction_type: PredictionType,
        student_prediction_type: PredictionType,
        alphas_cumprod: Tensor | None = None,
    ) -> None:
        self.denoiser = denoiser
        self._alphas_cumprod = alphas_cumprod
        self._types = (prediction_type, student_prediction_type)
        self._tap = BlockTap(denoiser)

    @torch.no_grad()
    def __call__(self, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Its prediction of a part of a batch, in the student's type, and its features by block."""
        x_t, timesteps, levels = (value[part.samples] for value in (batch.x_t, batch.timesteps, batch.levels))
        if self._alphas_cumprod is not None:
            timesteps = timesteps_of_equal_power(levels, self._alphas_cumprod.to(levels.device))
        dtype = next(self.denoiser.parameters()).dtype
        with self._tap.catch() as features:
            output = ask(self.denoiser, x_t, timesteps, part.conditioning, dtype)
        caught = dict(features)
        if self._types[0] != self._types[1]:
            caught.pop(list(caught)[-1])
        return batch.process.convert(output.float(), x_t, levels, *self._types), caught


class EarlierStudent(Teacher):
    """A frozen student, the teacher of its own styles: what keeps them while others are added (DMM §3.5).

    Args:
        student: frozen, in ``eval``. Its styles are the first of those of the student that learns, in the same order,
            and it predicts what that predicts.
    """

    def __init__(self, student: StyledStudent) -> None:
        self.denoiser: StyledStudent = student  # the style prompts, too, are to be where it computes

    @torch.no_grad()
    def __call__(self, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Its prediction of a part of a batch, each sample in its style, and its features by block."""
        prompts = self.denoiser.style_prompts
        dtype = prompts.embeddings.dtype
        weights = batch.style_weights[part.samples, : len(prompts.embeddings)]
        x_t, timesteps = batch.x_t[part.samples].to(dtype), batch.timesteps[part.samples]
        output = self.denoiser(x_t, timesteps, part.conditioning, weights)
        return output.prediction.float(), output.features


class Teachers(Protocol):
    """Teachers by index; one that is asked for may be used until the next one is."""

    def __getitem__(self, index: int, /) -> Teacher:
        """Its weights are on the device."""


@dataclass(frozen=True)
class Adversary:
    """The discriminator as the student meets it.

    Attributes:
        weight: lambda_adv.
        prediction_type: what the student predicts.
    """

    discriminator: Discriminator
    weight: float
    prediction_type: PredictionType


@dataclass(frozen=True)
class Seen:
    """What the discriminator's backbone made of a batch, for the head to learn from; no gradient passes.

    Attributes:
        student, teacher: (B, C_mid, h, w), of the student's latents and of the teachers'.
        styles: (B,) int64.
        batch: that it was made of.
    """

    student: Tensor
    teacher: Tensor
    styles: Tensor
    batch: Batch


@dataclass(frozen=True)
class Distillation:
    """The loss of one batch.

    Attributes:
        loss: scalar, to be minimised; it sums, over all batches of a step, to the mean over styles, weighed
            as their teachers are.
        terms: each term's per-sample values, (B,), detached, to be logged.
        seen: by the adversary, where there is one.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    seen: Seen | None = None


class Lesson(Protocol):
    """What a student learns of a batch."""

    def __call__(self, student: nn.Module, batch: Any, averages: Mapping[str, Tensor], /) -> Distillation:
        """Compare the student with what it should be.

        Args:
            student: wrapped or not.
            batch: :class:`Samples`.
            averages: the running averages of its parameters, by name; of a run that keeps none, the parameters.
        """


@dataclass(frozen=True)
class Imitation:
    """The lesson of a merge: :func:`distill` with these arguments."""

    teachers: Teachers
    feature_weight: float
    adversary: Adversary | None = None

    def __call__(self, student: nn.Module, batch: Batch, averages: Mapping[str, Tensor], /) -> Distillation:
        """Compare the student with its teachers; it has no use for its averages."""
        return distill(student, self.teachers, batch, feature_weight=self.feature_weight, adversary=self.adversary)


def distill(
    student: nn.Module,
    teachers: Teachers,
    batch: Batch,
    *,
    feature_weight: float,
    adversary: Adversary | None = None,
) -> Distillation:
    """Compare the student, in each sample's style, with the sample's teacher.

    Args:
        student: a :class:`dmm.models.student.StyledStudent`, wrapped or not; it runs once over the batch.
        teachers: by index; each runs over its parts.
        feature_weight: lambda_feat; at 0 features are not compared.
        adversary: frozen in here; without one there is no adversarial term.
    Source: DMM eq. 9, 10 and 13, Algorithm 1 lines 4-14.
    """
    targets = [teachers[part.teacher](batch, part) for part in batch.parts]
    output = student(batch.x_t, batch.timesteps, batch.conditioning, batch.style_weights)
    target = torch.cat([prediction for prediction, _ in targets])
    terms = {"score": score_loss(output.prediction, target)}
    factors: dict[str, Tensor | float] = {"score": batch.score_weights}
    if feature_weight:
        factors["feature"] = feature_weight
        terms["feature"] = torch.cat(
            [
                feature_loss({name: value[part.samples] for name, value in output.features.items()}, features)
                for part, (_, features) in zip(batch.parts, targets, strict=True)
            ]
        )
    seen = None
    if adversary is not None:
        factors["adversarial"] = adversary.weight
        terms["adversarial"], seen = _meet(adversary, batch, output.prediction, target)
    total = torch.stack([factors[name] * values for name, values in terms.items()]).sum(0)
    logged = {name: values.detach() for name, values in terms.items()}
    return Distillation((total * batch.loss_weights).sum(), logged, seen)


def _meet(adversary: Adversary, batch: Batch, student_output: Tensor, target: Tensor) -> tuple[Tensor, Seen]:
    """The adversarial term, (B,), and what the discriminator is to learn from."""
    again, styles = batch.again, batch.style_weights.argmax(1)
    assert again is not None

    def look(output: Tensor) -> Tensor:
        x_s = batch.process.rediffuse(
            output.float(), batch.x_t, batch.levels, again.noise, again.levels, adversary.prediction_type
        )
        return adversary.discriminator.look(x_s, again.timesteps, batch.conditioning)

    with torch.no_grad():
        of_teacher = look(target)
    of_student = look(student_output)
    term = adversarial_loss(adversary.discriminator.judge_frozen(of_student), styles)
    return term, Seen(of_student.detach(), of_teacher, styles, batch)


def discriminate(head: nn.Module, seen: Seen) -> Distillation:
    """Compare what the discriminator's head says with what it should have said.

    Args:
        head: of the discriminator, wrapped or not.
    Returns: its loss; ``terms`` are the loss and the shares of right answers, on the student's latents and on the
        teachers': 1 and 1 where it always wins, 0 and 1 / 2 where it is always fooled.
    Source: DMM Algorithm 1 lines 16-17.
    """
    logits = head(torch.cat([seen.student, seen.teacher]).float())
    of_student, of_teacher = logits.chunk(2)
    loss = discriminator_loss(of_student, of_teacher, seen.styles)
    num_styles = logits.shape[1] // 2
    terms = {
        "discriminator": loss.detach(),
        "discriminator_student_accuracy": (of_student.argmax(1) == num_styles + seen.styles).float(),
        "discriminator_teacher_accuracy": (of_teacher.argmax(1) == seen.styles).float(),
    }
    return Distillation((loss * seen.batch.loss_weights).sum(), terms)
