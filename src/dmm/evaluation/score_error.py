"""Fidelity without sampling: how far a merged model's predictions are from its teachers', beside the base's.

For style i, over held-out latents noised at uniform timesteps, and with every prediction taken as epsilon,

    sum ||student_i - teacher_i||^2 / sum ||base - teacher_i||^2:

0 for a student that says what its teacher says, 1 for one that has learnt nothing. It is a ratio of sums, so
that no sample on which base and teacher happen to agree weighs more than another.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dmm.data.training import STUDENT
from dmm.families import ask, denoiser_of, family_of
from dmm.formats.schedules import noise_schedule, predicted, process_of, same_schedules
from dmm.maths.draws import draw
from dmm.maths.processes import Process
from dmm.maths.schedules import num_answerable, timesteps_of_equal_power
from dmm.pipeline.styled import temporary_style
from dmm.training.batches import CaptionedLatents

References = Callable[[range], dict[str, Tensor]]
"""What ``teacher`` and ``base`` say of a style's draws, (B, C, H, W) float32 each, as they predict."""


def ask_again(_style: str, _num_draws: int, references: References) -> References:
    """Keep nothing of what teachers and base say."""
    return references


@dataclass(frozen=True)
class ScoreError:
    """Relative score errors.

    Attributes:
        by_style: over all timesteps.
        by_band: for each style, over each band of timesteps, from clean to noisy.
        bands: the timesteps of each band.
    """

    by_style: dict[str, float]
    by_band: dict[str, list[float]]
    bands: list[range]

    @property
    def mean(self) -> float:
        """Over styles."""
        return sum(self.by_style.values()) / len(self.by_style)

    @property
    def curve(self) -> list[float]:
        """Over styles, for each band."""
        return [sum(errors) / len(errors) for errors in zip(*self.by_band.values(), strict=True)]


@torch.no_grad()
def score_error(
    student: Any,
    teachers: Mapping[str, Any],
    base: Any,
    data: CaptionedLatents,
    rows: Mapping[str, Tensor],
    *,
    draws_per_row: int = 16,
    num_bands: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    keep: Callable[[str, int, References], References] = ask_again,
    readers: Mapping[str, str] = MappingProxyType({}),
) -> ScoreError:
    """Measure a merged model against its teachers.

    Args:
        student: a pipeline with styles; the one that is set is set again afterwards.
        teachers: pipelines by style.
        base: the pipeline that the student is measured beside. All are on one device; the noise
            schedule is the base's, and a teacher of another is asked where its own has equal signal.
        data: latents that no training has seen, and their captions as the student's and each teacher's text encoder
            read them; captions are never dropped.
        rows: for each style, (M,) int64, on which of the data it is judged.
        draws_per_row: how many times each row is noised.
        num_bands: into which the timesteps are cut.
        seed: of noise and timesteps, which depend on it and on a row's place alone: one for all styles.
        batch_size: samples that a model is given at a time.
        keep: given a style, the number of its draws, and what tells of them, the same from wherever it is kept: of
            teachers and base, which do not change with the student, it need not be asked twice.
        readers: by style, whose text encoder of the data's is the student's in it; the base's, by default.
    Raises: ValueError: a band has no samples, or base and teacher say the same in it.
    """
    process = process_of(base.scheduler.config, family_of(base))
    num_timesteps = len(process.levels)
    edges = torch.tensor([num_timesteps * band // num_bands for band in range(num_bands + 1)])
    by_style, by_band = {}, {}
    for style, teacher in teachers.items():
        # squared distances to the teacher, by band: the student's and the base's
        sums = torch.zeros(2, num_bands, dtype=torch.float64)
        drawn = _Draws(data, rows[style], draws_per_row, seed, process, _reach(teacher, base))
        references = keep(style, len(drawn), partial(_say, style, teacher, base, drawn))
        for start in range(0, len(drawn), batch_size):
            span = range(start, min(start + batch_size, len(drawn)))
            said, noised = references(span), drawn.noised(span)
            with temporary_style(student, style):
                said["student"] = _predict(student, noised, drawn.conditioning(readers.get(style, STUDENT), span))
            compared = {
                name: noised.compared(said[name], pipeline)
                for name, pipeline in (("student", student), ("teacher", teacher), ("base", base))
            }
            bands = torch.bucketize(noised.steps, edges[1:], right=True)
            for i, name in enumerate(("student", "base")):
                sums[i].index_add_(0, bands, (compared[name] - compared["teacher"]).square().flatten(1).sum(1))
        if not (sums[1] > 0).all():
            raise ValueError(
                f"'{style}': in a band of timesteps nothing was drawn, or base and teacher say the same; raise "
                "draws_per_row, or lower num_bands."
            )
        by_style[style] = (sums[0].sum() / sums[1].sum()).item()
        by_band[style] = (sums[0] / sums[1]).tolist()
    bands_of = [range(int(start), int(end)) for start, end in itertools.pairwise(edges)]
    return ScoreError(by_style, by_band, bands_of)


@dataclass(frozen=True)
class _Noised:
    """Latents, noised: x_t (B, C, H, W) float32, its steps (B,), and the process that noised them."""

    x_t: Tensor
    steps: Tensor
    process: Process

    @property
    def levels(self) -> Tensor:
        """(B,), of noise."""
        return self.process.levels[self.steps]

    def compared(self, prediction: Tensor, pipeline: Any) -> Tensor:
        """What a pipeline predicts of them, as such are compared: as epsilon, or a flow's velocity; float64."""
        types: Any = (predicted(pipeline.scheduler.config), self.process.measured_as)
        return self.process.convert(prediction.double(), self.x_t.double(), self.levels, *types)


@dataclass(frozen=True)
class _Draws:
    """Every row of a style noised several times: first all rows once, then all once again."""

    data: CaptionedLatents
    rows: Tensor
    draws_per_row: int
    seed: int
    process: Process
    num_timesteps: int
    """How many of the schedule's, from the first on, the style's teacher can be asked about."""

    def __len__(self) -> int:
        return len(self.rows) * self.draws_per_row

    def noised(self, span: range) -> _Noised:
        """Some of them, which depend on the seed and their places alone."""
        drawn = [
            draw(
                self.seed,
                place // len(self.rows),
                [place % len(self.rows)],
                num_rows=self.data.num_rows,
                num_own=[[()]],
                own=(),
                latent_shape=self.data.latent_shape,
                num_timesteps=self.num_timesteps,
                caption_dropout=0.0,
            )
            for place in span
        ]
        steps = torch.cat([one.timesteps for one in drawn])
        noise = torch.cat([one.noise for one in drawn])
        x_t = self.process.add_noise(self.data.latents(self._rows_of(span)), noise, self.process.levels[steps])
        return _Noised(x_t, steps, self.process)

    def conditioning(self, encoder: str, span: range) -> dict[str, Tensor]:
        """What a UNet reads of their captions."""
        rows = self._rows_of(span)
        return self.data.conditioning(encoder, rows, torch.zeros(len(rows), dtype=torch.bool))

    def _rows_of(self, span: range) -> Tensor:
        return self.rows[torch.tensor(span) % len(self.rows)]


def _say(style: str, teacher: Any, base: Any, drawn: _Draws, span: range) -> dict[str, Tensor]:
    """What a teacher and the base say."""
    noised = drawn.noised(span)
    return {
        "teacher": _predict(teacher, noised, drawn.conditioning(style, span)),
        "base": _predict(base, noised, drawn.conditioning(STUDENT, span)),
    }


def _predict(pipeline: Any, noised: _Noised, conditioning: Mapping[str, Tensor]) -> Tensor:
    """What a pipeline's UNet says: (B, C, H, W) float32, on the CPU."""
    denoiser = denoiser_of(pipeline)
    read = {name: tensor.to(denoiser.device) for name, tensor in conditioning.items()}
    timesteps = noised.process.timesteps[noised.steps]
    if not family_of(pipeline).is_flow:  # those of one flow are asked at one sigma, whatever their shifts
        own = noise_schedule(pipeline.scheduler.config)
        if not same_schedules(own, noised.process.levels):
            timesteps = timesteps_of_equal_power(noised.levels, own)
    x_t, timesteps = noised.x_t.to(denoiser.device), timesteps.to(denoiser.device)
    return ask(denoiser, x_t, timesteps, read, denoiser.dtype).float().cpu()


def _reach(teacher: Any, base: Any) -> int:
    """How many of the base's timesteps, from the first on, a teacher can be asked about."""
    types = (predicted(teacher.scheduler.config), predicted(base.scheduler.config))
    own, asked = (noise_schedule(pipeline.scheduler.config) for pipeline in (teacher, base))
    return num_answerable(asked, own, needs_signal=types == ("epsilon", "v_prediction"))
