import torch

from dmm.maths.schedules import LEAST_SIGNAL, num_answerable, timesteps_of_equal_power

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
STOCK = (1 - BETAS).cumprod(0).float()
ROOTS = STOCK.double().sqrt()
ZERO = ((ROOTS - ROOTS[-1]) * ROOTS[0] / (ROOTS[0] - ROOTS[-1])).square().float()  # rescaled to end without signal


def test_a_schedule_has_its_own_powers_at_its_own_timesteps():
    assert timesteps_of_equal_power(STOCK, STOCK).allclose(torch.arange(1000.0), atol=1e-2)


def test_there_and_back_again():
    asked = STOCK[torch.tensor([1, 250, 600, 999])]
    there = timesteps_of_equal_power(asked, ZERO)
    assert (there[1:] < torch.tensor([250.0, 600.0, 999.0])).all()  # the rescaled one is the noisier at each step
    # between two steps the power is that of an angle in between
    before, share = there.long(), there.double().frac()
    angles = ZERO.double().sqrt().arccos()
    found = torch.lerp(angles[before], angles[before + 1], share).cos().square().float()
    assert found.allclose(asked, rtol=1e-3)


def test_beyond_its_ends_a_schedule_answers_at_them():
    assert timesteps_of_equal_power(torch.tensor([1.0, 0.0]), STOCK).tolist() == [0, 999]
    assert timesteps_of_equal_power(torch.tensor([0.0]), ZERO).item() == 999


def test_steps_without_signal_are_not_everybodys():
    assert num_answerable(STOCK, ZERO, needs_signal=False) == 1000
    assert num_answerable(ZERO, ZERO, needs_signal=False) == 1000
    assert num_answerable(ZERO, ZERO, needs_signal=True) == 999
    short = num_answerable(ZERO, STOCK, needs_signal=True)
    assert 850 < short < 900
    assert ZERO[short - 1] >= STOCK[-1] > ZERO[short] > LEAST_SIGNAL
