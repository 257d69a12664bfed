"""Batches of a training step: draws made on stored latents and texts, noised, and cut into micro-batches."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmm.data.training import STUDENT, student_in
from dmm.maths.draws import draw, draw_again, draw_size
from dmm.maths.processes import Process
from dmm.maths.sharing import Group
from dmm.models.devices import send
from dmm.training.distill import Batch, Part, Rediffusion


class CaptionedLatents(Protocol):
    """Latents with their captions as text encoders read them."""

    num_rows: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def latents(self, rows: Tensor) -> Tensor:
        """(B, C, H, W) float32, scaled."""

    def conditioning(self, encoder: str, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """What a denoiser reads of B rows, as the named encoder made them; the empty caption's where dropped."""


class Data(CaptionedLatents, Protocol):
    """What batches are made from; :class:`dmm.data.TrainingData` is."""

    def shown(self, rows: Tensor, styles: Sequence[str]) -> dict[str, Tensor]:
        """Further keyword arguments for B rows, as the teachers of their styles read them."""

    @property
    def sizes(self) -> Sequence[Tensor]:
        """The rows of each size of latents, (R,) int64."""

    def rows_of(self, painter: str) -> Tensor:
        """(R,) int64, the rows that a style's teacher painted, or the student in it: :func:`student_in`."""


@dataclass(frozen=True)
class Role:
    """What a teacher supervises.

    Attributes:
        styles: indices of the styles that it teaches; where they are several, a sample's is drawn.
        encoder: whose text encoder it reads, a name of :class:`Data`.
        student: whose the student reads in these styles, likewise.
        share: of every batch and of the loss; those of all roles sum to 1.
        num_timesteps: of the student's, how many from the first on the teacher can be asked about; by default all.
    """

    styles: Sequence[int]
    encoder: str
    share: float
    num_timesteps: int | None = None
    student: str = STUDENT


def cut(groups: Sequence[Group], micro_batch_size: int) -> list[list[tuple[int, int, float]]]:
    """The samples of a step in micro-batches: each sample's teacher, index in the global batch, and loss weight.

    Where every teacher has enough samples to fill one, a micro-batch has one teacher, which then computes all of it at
    once: parts of a few samples each leave a GPU idle. Else teachers share micro-batches, so that these are full.
    """
    by_teacher = [[(group.teacher, index, group.weight) for index in group.indices] for group in groups]
    if min(map(len, by_teacher), default=0) < micro_batch_size:
        samples = [sample for of_teacher in by_teacher for sample in of_teacher]
        return [samples[start : start + micro_batch_size] for start in range(0, len(samples), micro_batch_size)]
    cuts = []
    for of_teacher in by_teacher:
        count = -(-len(of_teacher) // micro_batch_size)
        places = [len(of_teacher) * place // count for place in range(count + 1)]
        cuts += [of_teacher[first:last] for first, last in itertools.pairwise(places)]
    return cuts


class Batches:
    """All that a process trains on, by step.

    Args:
        data: latents and the encoded captions.
        styles: names, in the order of the student's style prompts.
        roles: of the teachers, by index.
        groups: this process's part of every global batch.
        process: that noises latents, the student's.
        micro_batch_size: samples, at most, of one batch.
        seed: of everything random.
        device: where the batches are wanted.
        own: the shares of each style's samples that its own teacher painted, and that the student painted in it before
            it was trained; the others are of everything else.
        noise_weighting: see :meth:`dmm.maths.processes.Process.score_weights`.
        adversarial: draw, too, how a discriminator's images are diffused.
    """

    def __init__(
        self,
        data: Data,
        styles: Sequence[str],
        roles: Sequence[Role],
        *,
        groups: Sequence[Group],
        process: Process,
        caption_dropout: float,
        micro_batch_size: int,
        seed: int,
        device: torch.device,
        own: tuple[float, float] = (0.0, 0.0),
        noise_weighting: float = 0.0,
        adversarial: bool = False,
    ) -> None:
        self._data, self._roles, self._styles = data, roles, list(styles)
        self._process, self._num_steps = process, len(process.levels)
        self._caption_dropout, self._seed, self._device = caption_dropout, seed, device
        self._adversarial = adversarial
        self._own = own
        kinds = [(data.rows_of(style), data.rows_of(student_in(style))) for style in styles]
        self._num_own = [[len(rows) for rows in of_style] for of_style in kinds]
        self._own_rows = [torch.cat(of_style) for of_style in kinds]
        painted = torch.cat([rows for _, rows in kinds])
        # by size: all pictures of a step have one
        self._shared_rows = [rows[~torch.isin(rows, painted)] for rows in data.sizes]
        self._score_weights = process.score_weights(noise_weighting)
        self._micro_batches = cut(groups, micro_batch_size)

    def __len__(self) -> int:
        """How many micro-batches a step has."""
        return len(self._micro_batches)

    def of_step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of a step, each with its samples ordered by teacher."""
        for samples in self._micro_batches:
            yield self._build(step, *zip(*samples, strict=True))

    def _build(self, step: int, teachers: Sequence[int], indices: Sequence[int], weights: Sequence[float]) -> Batch:
        counts = [len(rows) for rows in self._shared_rows]
        shared_rows = self._shared_rows[draw_size(self._seed, step, counts) if len(counts) > 1 else 0]
        shape = self._data.latents(shared_rows[:1]).shape[1:] if len(counts) > 1 else self._data.latent_shape
        draws = draw(
            self._seed,
            step,
            indices,
            num_rows=len(shared_rows),
            num_own=[[self._num_own[style] for style in self._roles[teacher].styles] for teacher in teachers],
            own=self._own,
            latent_shape=shape,
            num_timesteps=self._num_steps,
            caption_dropout=self._caption_dropout,
        )
        steps = self._within_reach(draws.timesteps, teachers)
        levels = self._process.levels[steps]
        styles = [
            self._roles[teacher].styles[drawn] for teacher, drawn in zip(teachers, draws.styles.tolist(), strict=True)
        ]
        own_rows = [self._own_rows[style][row] for style, row in zip(styles, draws.own_rows, strict=True) if row >= 0]
        rows = shared_rows[draws.rows]
        rows[draws.own_rows >= 0] = torch.tensor(own_rows, dtype=torch.int64)
        x_t = self._process.add_noise(self._data.latents(rows), draws.noise, levels)
        shown = self._to_device(self._data.shown(rows, [self._styles[style] for style in styles]))
        parts = []
        for teacher in dict.fromkeys(teachers):
            samples = slice(teachers.index(teacher), teachers.index(teacher) + teachers.count(teacher))
            # both sides see the same dropped captions: a mismatch teaches nothing
            encoder = self._roles[teacher].encoder
            conditioning = self._data.conditioning(encoder, rows[samples], draws.dropped[samples])
            own = {name: value[samples] for name, value in shown.items()}
            parts.append(Part(teacher, samples, self._to_device(conditioning) | own))
        one_hot = torch.nn.functional.one_hot(torch.tensor(styles), len(self._styles))
        return Batch(
            x_t=send(x_t, self._device),
            timesteps=send(self._process.timesteps[steps], self._device),
            levels=send(levels, self._device),
            process=self._process,
            style_weights=send(one_hot.float(), self._device),
            conditioning=self._to_device(self._read_by_student(teachers, rows, draws.dropped)) | shown,
            loss_weights=send(torch.tensor(weights), self._device),
            score_weights=send(self._score_weights[steps], self._device),
            parts=parts,
            again=self._again(step, indices, steps, shape) if self._adversarial else None,
        )

    def _read_by_student(self, teachers: Sequence[int], rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """The student's conditioning, of each sample as it reads in the styles of its teacher."""
        read, start = [], 0
        for encoder, samples in itertools.groupby(self._roles[teacher].student for teacher in teachers):
            end = start + len(list(samples))
            read.append(self._data.conditioning(encoder, rows[start:end], dropped[start:end]))
            start = end
        return {name: torch.cat([one[name] for one in read]) for name in read[0]} if len(read) > 1 else read[0]

    def _within_reach(self, steps: Tensor, teachers: Sequence[int]) -> Tensor:
        """Uniform steps, and still uniform among those that each sample's teacher can be asked about."""
        whole = self._num_steps
        reach = torch.tensor([self._roles[teacher].num_timesteps or whole for teacher in teachers])
        return steps * reach // whole

    def _again(self, step: int, indices: Sequence[int], steps: Tensor, shape: Sequence[int]) -> Rediffusion:
        later, noise = draw_again(
            self._seed,
            step,
            indices,
            timesteps=steps,
            latent_shape=shape,
            num_timesteps=self._num_steps,
        )
        told, levels = self._process.timesteps[later], self._process.levels[later]
        return Rediffusion(*(send(one, self._device) for one in (told, levels, noise)))

    def _to_device(self, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: send(value, self._device) for name, value in conditioning.items()}
