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
        rows: (B,) int64, which row of the data each sample is.
        timesteps: (B,) int64, uniform.
        noise: (B, C, H, W) float32, standard normal.
        dropped: (B,) bool, whose caption is replaced by the empty one.
    """

    rows: Tensor
    timesteps: Tensor
    noise: Tensor
    dropped: Tensor


def draw(
    seed: int,
    step: int,
    indices: Sequence[int],
    *,
    num_rows: Sequence[int],
    latent_shape: Sequence[int],
    num_timesteps: int,
    caption_dropout: float,
) -> Draws:
    """Draw what the samples at ``indices`` of the global batch of ``step`` are made of.

    Args:
        num_rows: for each of the B samples, the number of rows that it may be taken from.
        latent_shape: (C, H, W).
        caption_dropout: in [0, 1].
    """
    rows, timesteps, noise, dropped = [], [], [], []
    for index, count in zip(indices, num_rows, strict=True):
        # counter-based, so that each sample has 2**64 blocks of one stream that no other sample reads
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, step]))
        rows.append(generator.integers(count))
        timesteps.append(generator.integers(num_timesteps))
        dropped.append(generator.random() < caption_dropout)
        noise.append(generator.standard_normal(tuple(latent_shape), dtype=np.float32))
    return Draws(torch.tensor(rows), torch.tensor(timesteps), torch.from_numpy(np.stack(noise)), torch.tensor(dropped))
