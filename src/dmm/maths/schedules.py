"""Two noise schedules side by side: where one has the signal power that the other has.

A noised picture is what its signal power makes it: whichever schedule it was noised by, a model of another schedule can
be asked about it, at the timestep where its own has that power.
"""

import torch
from torch import Tensor

LEAST_SIGNAL = 1e-7
"""The signal power at which nothing of a picture is left; some schedulers write 2**-24 for 0."""


def timesteps_of_equal_power(alpha_bar: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Where a schedule has these signal powers.

    Between two of its steps arccos(sqrt(alpha_bar)) is taken to be linear: the angle between picture and noise, which
    is finite where alpha_bar is 0.

    Args:
        alpha_bar: (B,) in [0, 1].
        alphas_cumprod: (T,), falling.
    Returns: (B,) float32 in [0, T - 1], not whole in general; the first step where the power is above all of the
        schedule's, the last where it is below.
    """
    angles, asked = (power.double().sqrt().clamp(max=1).arccos() for power in (alphas_cumprod, alpha_bar))
    after = torch.searchsorted(angles, asked.contiguous()).clamp(1, len(angles) - 1)
    before = after - 1
    share = (asked - angles[before]) / (angles[after] - angles[before])
    return (before + share.clamp(0, 1)).float()


def num_answerable(asked: Tensor, alphas_cumprod: Tensor, *, needs_signal: bool) -> int:
    """How many of one schedule's steps, from the first on, a model of another schedule can be asked about.

    Args:
        asked: (T,), falling; the schedule whose steps they are.
        alphas_cumprod: (S,), falling; the model's.
        needs_signal: whether its answer means nothing where there is no signal: that of a model which predicts noise,
            to one that predicts velocity.
    """
    # to rounding, as two ways of writing one schedule differ
    answerable = asked >= alphas_cumprod[-1] * (1 - 1e-4) - 1e-7
    if needs_signal:
        answerable &= asked > LEAST_SIGNAL
    return int(answerable.sum())
