"""Batches of few-step distillation: samples noised to points of the teacher's path, and where each is led."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmm.maths.consistency import embed_guidance, path_timesteps, sub_path_noise
from dmm.maths.diffusion import add_noise
from dmm.maths.draws import draw, draw_shares
from dmm.maths.schedules import timesteps_of_equal_power
from dmm.maths.sharing import Group
from dmm.models.devices import send
from dmm.models.few_step import TOLD_DIM
from dmm.training.batches import Data
from dmm.training.distill import Samples


@dataclass(frozen=True)
class PathBatch(Samples):
    """B samples at points of the teacher's path, and the points before them that its steps end at.

    Attributes:
        earlier: (B,) the timesteps s that the steps end at.
        alpha_bar_s: (B,) signal power there.
        gamma: (B,) in (0, 1], where the student begins between the two; 1 is at ``x_t``.
        between: (B,) the timesteps with as much noise as there is, not whole in general.
        guidance: (B,) that the teacher is guided with.
        unconditional: what the denoiser reads of the empty caption, by flat names.
        told: (B, TOLD_DIM), what the student and its target are told; None is nothing.
    """

    earlier: Tensor
    alpha_bar_s: Tensor
    gamma: Tensor
    between: Tensor
    guidance: Tensor
    unconditional: Mapping[str, Tensor]
    told: Tensor | None


class Paths:
    """All that a process trains on, by step.

    Args:
        data: latents and the encoded captions.
        styles: names, in the order of the student's.
        readers: by style, whose text encoder of the data's is the student's in it.
        groups: this process's part of every global batch; of teachers, the styles' indices.
        style_by_style: whether a batch has samples of one style only.
        alphas_cumprod: (T,), the model's noise schedule.
        skip: timesteps between two points of the path.
        draws_gamma: whether the student begins anywhere between two points; else at the first.
        guidance: what the teacher's is drawn between; where that leaves a choice, the student is told it.
        own: the share of each style's samples that the model painted in it.
        micro_batch_size: samples, at most, of one batch.
        seed: of everything random.
    """

    def __init__(
        self,
        data: Data,
        styles: Sequence[str],
        *,
        readers: Sequence[str],
        groups: Sequence[Group],
        style_by_style: bool,
        alphas_cumprod: Tensor,
        skip: int,
        draws_gamma: bool,
        guidance: tuple[float, float],
        own: float,
        caption_dropout: float,
        micro_batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._data, self._num_styles, self._own = data, len(styles), own
        self._readers = readers
        self._alphas_cumprod = alphas_cumprod
        self._path = path_timesteps(len(alphas_cumprod), skip)
        self._draws_gamma, self._guidance = draws_gamma, guidance
        self._caption_dropout, self._seed, self._device = caption_dropout, seed, device
        self._own_rows = [data.rows_of(style) for style in styles]
        parts = [[(group.teacher, index, group.weight) for index in group.indices] for group in groups]
        if not style_by_style:
            parts = [[sample for part in parts for sample in part]]
        self._micro_batches = [
            part[start : start + micro_batch_size] for part in parts for start in range(0, len(part), micro_batch_size)
        ]

    def __len__(self) -> int:
        """How many micro-batches a step has."""
        return len(self._micro_batches)

    def of_step(self, step: int) -> Iterator[PathBatch]:
        """The micro-batches of a step."""
        for samples in self._micro_batches:
            yield self._build(step, *zip(*samples, strict=True))

    def _build(self, step: int, styles: Sequence[int], indices: Sequence[int], weights: Sequence[float]) -> PathBatch:
        draws = draw(
            self._seed,
            step,
            indices,
            num_rows=self._data.num_rows,
            num_own=[[[len(self._own_rows[style])]] for style in styles],
            own=(self._own,),
            latent_shape=self._data.latent_shape,
            num_timesteps=len(self._path),
            caption_dropout=self._caption_dropout,
        )
        rows = draws.rows
        for i, (style, own_row) in enumerate(zip(styles, draws.own_rows.tolist(), strict=True)):
            if own_row >= 0:
                rows[i] = self._own_rows[style][own_row]
        on_path, of_range = draw_shares(self._seed, step, indices)
        # above 0, where of a point of pure noise nothing at all is left
        gamma = 1 - on_path if self._draws_gamma else torch.ones_like(on_path)
        least, most = self._guidance
        guidance = least + (most - least) * of_range
        timesteps = self._path[draws.timesteps]
        # the first point has none before it, and is led to where the schedule begins
        earlier = torch.where(draws.timesteps > 0, self._path[(draws.timesteps - 1).clamp(min=0)], 0)
        alpha_bar_t, alpha_bar_s = self._alphas_cumprod[timesteps], self._alphas_cumprod[earlier]
        between = timesteps
        if self._draws_gamma:
            noise_power = sub_path_noise(gamma, alpha_bar_t, alpha_bar_s)
            between = timesteps_of_equal_power(alpha_bar_t / (alpha_bar_t + noise_power), self._alphas_cumprod)
        told = send(embed_guidance(guidance, TOLD_DIM), self._device) if least < most else None
        one_hot = torch.nn.functional.one_hot(torch.tensor(styles), self._num_styles)
        every_caption = torch.ones_like(draws.dropped)
        (reader,) = {self._readers[style] for style in styles}
        on_device = self._to_device
        return PathBatch(
            x_t=send(add_noise(self._data.latents(rows), draws.noise, alpha_bar_t), self._device),
            timesteps=send(timesteps, self._device),
            levels=send(alpha_bar_t, self._device),
            style_weights=send(one_hot.float(), self._device),
            conditioning=on_device(self._data.conditioning(reader, rows, draws.dropped)),
            loss_weights=send(torch.tensor(weights), self._device),
            earlier=send(earlier, self._device),
            alpha_bar_s=send(alpha_bar_s, self._device),
            gamma=send(gamma, self._device),
            between=send(between, self._device),
            guidance=send(guidance, self._device),
            unconditional=on_device(self._data.conditioning(reader, rows, every_caption)),
            told=told,
        )

    def _to_device(self, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: send(value, self._device) for name, value in conditioning.items()}
