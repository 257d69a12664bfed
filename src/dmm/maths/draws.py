"""What is random in training, as functions of (seed, step, index of the sample in the global batch).

Nothing depends on history, nor on which process draws: a resumed run goes on as if it had not
stopped, one process and two see the same batch, and no two samples share a draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """What was drawn for B samples.

    Attributes:
        styles: (B,) int64, which of the styles that it may be in each sample is.
        rows: (B,) int64, which of all rows each sample is.
        own_rows: (B,) int64, which of its style's own rows, kind after kind, it is instead; -1 where it is not.
        timesteps: (B,) int64, uniform.
        noise: (B, C, H, W) float32, standard normal.
        dropped: (B,) bool, whose caption is replaced by the empty one.
    """

    styles: Tensor
    rows: Tensor
    own_rows: Tensor
    timesteps: Tensor
    noise: Tensor
    dropped: Tensor


def draw(
    seed: int,
    step: int,
    indices: Sequence[int],
    *,
    num_rows: int,
    num_own: Sequence[Sequence[Sequence[int]]],
    own: Sequence[float],
    latent_shape: Sequence[int],
    num_timesteps: int,
    caption_dropout: float,
) -> Draws:
    """Draw what the samples at ``indices`` of the global batch of ``step`` are made of.

    Args:
        num_rows: of all rows.
        num_own: for each of the B samples and each of the styles that it may be in, the numbers of the style's own
            rows of each kind.
        own: the shares of samples that are taken from those, by kind; in [0, 1], in all at most 1.
        latent_shape: (C, H, W).
        caption_dropout: in [0, 1].
    """
    styles, rows, own_rows, timesteps, noise, dropped = [], [], [], [], [], []
    for index, counts in zip(indices, num_own, strict=True):
        # counter-based, so that each sample has 2**64 blocks of one stream that no other sample reads
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, step]))
        # where there is no choice of styles, nothing is drawn of the stream
        styles.append(int(generator.integers(len(counts))) if len(counts) > 1 else 0)
        rows.append(generator.integers(num_rows))
        timesteps.append(generator.integers(num_timesteps))
        dropped.append(generator.random() < caption_dropout)
        noise.append(generator.standard_normal(tuple(latent_shape), dtype=np.float32))
        # last of the stream: without it, all else is the same
        own_rows.append(_draw_own(generator, counts[styles[-1]], own) if any(own) else -1)
    return Draws(
        torch.tensor(styles),
        torch.tensor(rows),
        torch.tensor(own_rows),
        torch.tensor(timesteps),
        torch.from_numpy(np.stack(noise)),
        torch.tensor(dropped),
    )


def _draw_own(generator: np.random.Generator, counts: Sequence[int], shares: Sequence[float]) -> int:
    """One of a style's own rows, or -1."""
    chance, before = generator.random(), 0
    for count, share in zip(counts, shares, strict=True):
        if chance < share:
            return before + int(generator.integers(count))
        chance, before = chance - share, before + count
    return -1


def draw_size(seed: int, step: int, counts: Sequence[int]) -> int:
    """Draw which of several sizes all pictures of a step have, each as often as there are pictures of it.

    Args:
        counts: of the pictures of each size.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 3 << 62, 0, step]))
    row = int(generator.integers(sum(counts)))
    return int(np.searchsorted(np.cumsum(counts), row, side="right"))


def draw_again(
    seed: int, step: int, indices: Sequence[int], *, timesteps: Tensor, latent_shape: Sequence[int], num_timesteps: int
) -> tuple[Tensor, Tensor]:
    """Draw what samples are diffused with a second time; of a stream of its own, so that :func:`draw` stays as it is.

    Args:
        timesteps: (B,) int64, where the samples are.
        latent_shape: (C, H, W).
    Returns: timesteps from there on, uniform, (B,) int64; standard normal noise, (B, C, H, W) float32.
    """
    later, noise = [], []
    for index, timestep in zip(indices, timesteps.tolist(), strict=True):
        # half of all streams away from what draw reads
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 1 << 63, index, step]))
        later.append(generator.integers(timestep, num_timesteps))
        noise.append(generator.standard_normal(tuple(latent_shape), dtype=np.float32))
    return torch.tensor(later), torch.from_numpy(np.stack(noise))


def draw_shares(seed: int, step: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw two numbers of each sample for few-step distillation; of a stream of its own, as :func:`draw_again`'s is.

    Returns: where each is on its sub-path, and what guidance it gets of a range: (B,) float32 each, uniform in [0, 1).
    """
    shares = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 1 << 62, index, step])).random(2, dtype=np.float32)
        for index in indices
    ]
    on_path, of_range = torch.from_numpy(np.stack(shares)).unbind(1)
    return on_path, of_range
