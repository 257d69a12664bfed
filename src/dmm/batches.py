"""Batches of a training step: draws made on stored latents and texts, noised, and cut into micro-batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dmm.diffusion import add_noise
from dmm.distill import Batch, Part
from dmm.draws import draw
from dmm.sharing import Group

STUDENT = "student"
"""Name of the student's text encoder, which is the base's."""


class Data(Protocol):
    """What batches are made from; :class:`dmm.data.TrainingData` is."""

    num_rows: int
    latent_shape: tuple[int, int, int]

    def latents(self, rows: Tensor) -> Tensor:
        """(B, C, H, W) float32, scaled."""

    def conditioning(self, encoder: str, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of a UNet for B rows, as the named encoder made them; the empty caption's where dropped."""


class Batches:
    """All that a process trains on, by step.

    Args:
        data: latents and the encoded captions.
        styles: the teachers' names, in their order; each is the name of its encoder in ``data``.
        groups: this process's part of every global batch.
        alphas_cumprod: (T,), the student's noise schedule.
        micro_batch_size: samples, at most, of one batch.
        seed: of everything random.
        device: where the batches are wanted.
    """

    def __init__(
        self,
        data: Data,
        styles: Sequence[str],
        groups: Sequence[Group],
        alphas_cumprod: Tensor,
        *,
        caption_dropout: float,
        micro_batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._data, self._styles = data, styles
        self._alphas_cumprod = alphas_cumprod
        self._caption_dropout, self._seed, self._device = caption_dropout, seed, device
        samples = [(group.teacher, index, group.weight) for group in groups for index in group.indices]
        starts = range(0, len(samples), micro_batch_size)
        self._micro_batches = [samples[start : start + micro_batch_size] for start in starts]

    def __len__(self) -> int:
        """How many micro-batches a step has."""
        return len(self._micro_batches)

    def of_step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of a step, each with its samples ordered by teacher."""
        for samples in self._micro_batches:
            yield self._build(step, *zip(*samples, strict=True))

    def _build(self, step: int, teachers: Sequence[int], indices: Sequence[int], weights: Sequence[float]) -> Batch:
        draws = draw(
            self._seed,
            step,
            indices,
            num_rows=[self._data.num_rows] * len(indices),
            latent_shape=self._data.latent_shape,
            num_timesteps=len(self._alphas_cumprod),
            caption_dropout=self._caption_dropout,
        )
        alpha_bar_t = self._alphas_cumprod[draws.timesteps]
        x_t = add_noise(self._data.latents(draws.rows), draws.noise, alpha_bar_t)
        style = torch.tensor(teachers)
        parts = []
        for teacher in dict.fromkeys(teachers):
            samples = slice(teachers.index(teacher), teachers.index(teacher) + teachers.count(teacher))
            # both sides see the same dropped captions: a mismatch teaches nothing
            conditioning = self._data.conditioning(self._styles[teacher], draws.rows[samples], draws.dropped[samples])
            parts.append(Part(teacher, samples, self._to_device(conditioning)))
        return Batch(
            x_t=x_t.to(self._device),
            timesteps=draws.timesteps.to(self._device),
            alpha_bar_t=alpha_bar_t.to(self._device),
            style_weights=torch.nn.functional.one_hot(style, len(self._styles)).float().to(self._device),
            conditioning=self._to_device(self._data.conditioning(STUDENT, draws.rows, draws.dropped)),
            loss_weights=torch.tensor(weights, device=self._device),
            parts=parts,
        )

    def _to_device(self, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self._device) for name, value in conditioning.items()}
