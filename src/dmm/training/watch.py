"""The relative score error while a student trains: the number to watch, at the cost of a few batches.

It is that of :mod:`dmm.evaluation.score_error`, on latents of the training data that are noised once, as no training
step noises them. What the base and the teachers say of them is asked once, too; later only the student is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmm.families import ask
from dmm.maths.diffusion import PredictionType
from dmm.maths.sharing import Group, share_batch
from dmm.training.batches import Batches
from dmm.training.distill import Batch, Teachers

SAMPLES_PER_STYLE = 32


def watched_groups(num_styles: Sequence[int], num_processes: int, process: int) -> list[Group]:
    """The samples that one process watches: as many of every style, whatever its share of the training.

    Args:
        num_styles: how many each teacher has.
        process: its index, in [0, num_processes).
    """
    whole = sum(num_styles)
    # where processes are many, one for each of them
    return share_batch(
        max(SAMPLES_PER_STYLE, num_processes) * whole, [n / whole for n in num_styles], num_processes, process
    )


class Watch:
    """Fixed noised latents, and what base and teachers say of them.

    Args:
        batches: whose step 0 is asked; this process's share.
        base: the denoiser that the student is measured beside; asked now, so that it may become the student.
        prediction_type: of the base and the student.
        styles: names, in the order of the student's style prompts.
    """

    def __init__(self, batches: Batches, base: nn.Module, prediction_type: PredictionType, styles: list[str]) -> None:
        self._type, self._styles = prediction_type, styles
        self._batches = list(batches.of_step(0))
        with torch.no_grad():
            self._of_base = [
                ask(base, batch.x_t, batch.timesteps, batch.conditioning).float() for batch in self._batches
            ]
        self._targets: list[Tensor] = []
        self._distances = torch.zeros(len(styles))

    def ask(self, teachers: Teachers) -> None:
        """Ask the teachers; they are not needed again."""
        self._targets = [
            torch.cat([teachers[part.teacher](batch, part)[0] for part in batch.parts]) for batch in self._batches
        ]
        self._distances = self._squared_errors(self._of_base)
        self._of_base = []

    @torch.no_grad()
    def measure(self, student: nn.Module, accelerator: Any) -> Mapping[str, float]:
        """``score_error``, the mean over styles, and ``score_error/STYLE``: 0 is the teacher, 1 the base.

        Args:
            student: a :class:`dmm.models.student.StyledStudent`, in ``eval``.
            accelerator: of all processes, each of which calls this.
        """
        said = [
            student(batch.x_t, batch.timesteps, batch.conditioning, batch.style_weights).prediction.float()
            for batch in self._batches
        ]
        sums = torch.stack([self._squared_errors(said), self._distances]).to(accelerator.device)
        errors, distances = accelerator.reduce(sums, reduction="sum")
        relative = errors / distances
        # a style that says what the base says has nothing to learn
        told = {name: one.item() for name, one in zip(self._styles, relative, strict=True) if one.isfinite()}
        if not told:
            return {}
        return {"score_error": sum(told.values()) / len(told)} | {f"score_error/{name}": e for name, e in told.items()}

    def _squared_errors(self, said: list[Tensor]) -> Tensor:
        """By style, the sum over samples of ||said - target||^2, both as they are compared: (N,), on the CPU."""
        sums = torch.zeros(len(self._styles), dtype=torch.float64)
        for batch, ours, target in zip(self._batches, said, self._targets, strict=True):
            difference = self._compared(ours, batch) - self._compared(target, batch)
            errors = difference.square().flatten(1).sum(1)
            sums += (errors @ batch.style_weights).double().cpu()
        return sums.float()

    def _compared(self, output: Tensor, batch: Batch) -> Tensor:
        return batch.process.convert(output, batch.x_t, batch.levels, self._type, batch.process.measured_as)
