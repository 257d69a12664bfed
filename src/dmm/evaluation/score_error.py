"""Fidelity without sampling: how far a merged model's predictions are from its teachers', beside the base's.

For style i, over held-out latents noised at uniform timesteps, and with every prediction taken as epsilon,

    sum ||student_i - teacher_i||^2 / sum ||base - teacher_i||^2:

0 for a student that says what its teacher says, 1 for one that has learnt nothing. It is a ratio of sums, so
that no sample on which base and teacher happen to agree weighs more than another.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmm.batches import STUDENT, CaptionedLatents
from dmm.diffusion import add_noise, convert_prediction
from dmm.draws import draw
from dmm.pipeline import temporary_style
from dmm.teachers import noise_schedule


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
) -> ScoreError:
    """Measure a merged model against its teachers.

    Args:
        student: a pipeline with styles; the one that is set is set again afterwards.
        teachers: pipelines by style.
        base: the pipeline that the student is measured beside. All are on one device, and of one noise schedule.
        data: latents that no training has seen, and their captions as the student's and each teacher's text encoder
            read them; captions are never dropped.
        rows: for each style, (M,) int64, on which of the data it is judged.
        draws_per_row: how many times each row is noised.
        num_bands: into which the timesteps are cut.
        seed: of noise and timesteps, which depend on it and on a row's place alone: one for all styles.
        batch_size: samples that a model is given at a time.
    Raises: ValueError: a band has no samples, or base and teacher say the same in it.
    """
    alphas_cumprod = noise_schedule(base.scheduler.config)
    num_timesteps = len(alphas_cumprod)
    edges = torch.tensor([num_timesteps * band // num_bands for band in range(num_bands + 1)])
    by_style, by_band = {}, {}
    for style, teacher in teachers.items():
        # squared distances to the teacher, by band: the student's and the base's
        sums = torch.zeros(2, num_bands, dtype=torch.float64)
        places = [(place, repeat) for repeat in range(draws_per_row) for place in range(len(rows[style]))]
        for start in range(0, len(places), batch_size):
            of_batch = places[start : start + batch_size]
            timesteps, noise = _draw(of_batch, seed, data, num_timesteps)
            chosen = rows[style][[place for place, _ in of_batch]]
            alpha_bar_t = alphas_cumprod[timesteps]
            x_t = add_noise(data.latents(chosen), noise, alpha_bar_t)
            kept = torch.zeros(len(chosen), dtype=torch.bool)
            read_by_base = data.conditioning(STUDENT, chosen, kept)
            read_by_teacher = data.conditioning(style, chosen, kept)
            target = _predict_noise(teacher, x_t, timesteps, alpha_bar_t, read_by_teacher)
            with temporary_style(student, style):
                said = _predict_noise(student, x_t, timesteps, alpha_bar_t, read_by_base)
            beside = _predict_noise(base, x_t, timesteps, alpha_bar_t, read_by_base)
            bands = torch.bucketize(timesteps, edges[1:], right=True)
            for i, prediction in enumerate((said, beside)):
                sums[i].index_add_(0, bands, (prediction - target).square().flatten(1).sum(1))
        if not (sums[1] > 0).all():
            raise ValueError(
                f"'{style}': in a band of timesteps nothing was drawn, or base and teacher say the same; raise "
                "draws_per_row, or lower num_bands."
            )
        by_style[style] = (sums[0].sum() / sums[1].sum()).item()
        by_band[style] = (sums[0] / sums[1]).tolist()
    bands_of = [range(int(start), int(end)) for start, end in itertools.pairwise(edges)]
    return ScoreError(by_style, by_band, bands_of)


def _draw(
    places: list[tuple[int, int]], seed: int, data: CaptionedLatents, num_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Timesteps, (B,), and noise, (B, C, H, W), of places of rows and how often they were drawn before."""
    drawn = [
        draw(
            seed,
            repeat,
            [place],
            num_rows=[[data.num_rows]],
            latent_shape=data.latent_shape,
            num_timesteps=num_timesteps,
            caption_dropout=0.0,
        )
        for place, repeat in places
    ]
    return torch.cat([one.timesteps for one in drawn]), torch.cat([one.noise for one in drawn])


def _predict_noise(
    pipeline: Any, x_t: Tensor, timesteps: Tensor, alpha_bar_t: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """What a pipeline's UNet says of x_t, as epsilon: (B, C, H, W) float64, on the CPU."""
    unet = pipeline.unet
    read = {name: tensor.to(unet.device, unet.dtype) for name, tensor in conditioning.items()}
    output = unet(x_t.to(unet.device, unet.dtype), timesteps.to(unet.device), **read, return_dict=False)[0]
    prediction_type = pipeline.scheduler.config.prediction_type
    return convert_prediction(output.cpu().double(), x_t.double(), alpha_bar_t, prediction_type, "epsilon")
