"""Rectified flow: there and back again, and the two processes through one interface."""

import pytest
import torch

from dmm.maths import flow
from dmm.maths.processes import RectifiedFlow, VariancePreserving


@pytest.fixture
def noised():
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    return x_0, noise, sigma


def test_velocity_leads_back_to_the_picture_and_on_to_the_noise(noised):
    x_0, noise, sigma = noised
    x_t, velocity = flow.add_noise(x_0, noise, sigma), noise - x_0
    torch.testing.assert_close(flow.predict_x0(velocity, x_t, sigma), x_0)
    torch.testing.assert_close(flow.predict_noise(velocity, x_t, sigma), noise)
    assert flow.add_noise(x_0, noise, torch.zeros(5)).equal(x_0)
    assert flow.add_noise(x_0, noise, torch.ones(5)).equal(noise)


def test_velocity_is_the_slope_of_the_line(noised):
    x_0, noise, _ = noised
    low, high = torch.full((5,), 0.25).double(), torch.full((5,), 0.75).double()
    slope = (flow.add_noise(x_0, noise, high) - flow.add_noise(x_0, noise, low)) / 0.5
    torch.testing.assert_close(slope, noise - x_0)


def test_what_is_diffused_again_is_the_clean_prediction_noised(noised):
    x_0, noise, sigma = noised
    x_t, other = flow.add_noise(x_0, noise, sigma), torch.randn(x_0.shape, dtype=torch.float64)
    again = flow.rediffuse(noise - x_0, x_t, sigma, other, (1 + sigma) / 2)
    torch.testing.assert_close(again, flow.add_noise(x_0, other, (1 + sigma) / 2))


def test_a_shift_moves_sigmas_towards_noise_and_keeps_the_ends():
    sigma = torch.linspace(0, 1, 11)
    assert flow.shifted(sigma, 1.0).equal(sigma)
    moved = flow.shifted(sigma, 3.0)
    assert (moved[1:-1] > sigma[1:-1]).all()
    torch.testing.assert_close(moved[[0, -1]], sigma[[0, -1]])
    torch.testing.assert_close(flow.shifted(moved, 1 / 3), sigma)


@pytest.mark.parametrize(("density", "std"), [("uniform", 1.0), ("logit_normal", 1.0), ("logit_normal", 0.5)])
def test_uniform_draws_of_the_quantiles_are_draws_of_the_density(density, std):
    sigmas = flow.quantiles(1000, density, 0.3, std)
    assert (sigmas.diff() > 0).all()
    assert 0 < sigmas[0] < sigmas[-1] < 1
    if density == "uniform":
        torch.testing.assert_close(sigmas.mean(), torch.tensor(0.5))
        return
    logits = sigmas.double().logit()
    torch.testing.assert_close(logits.mean(), torch.tensor(0.3).double())
    torch.testing.assert_close(logits.std(), torch.tensor(std).double(), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("process", "prediction_type"),
    [
        (VariancePreserving(torch.linspace(0.99, 0.01, 50)), "epsilon"),
        (RectifiedFlow(torch.linspace(0.02, 1, 50)), "flow_prediction"),
    ],
)
def test_steps_of_a_process_grow_noisier_and_say_so_to_the_denoiser(process, prediction_type):
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 1, 3, 8, 8, generator=generator).expand(-1, 50, -1, -1, -1)
    x_t = process.add_noise(x_0, noise, process.levels)
    left = (x_t - noise).square().flatten(1).mean(1)
    assert (left.diff() < 0).all()
    assert process.timesteps.shape == process.levels.shape
    assert (process.timesteps.diff() > 0).all()
    assert 0 <= process.timesteps.min() <= process.timesteps.max() <= 1000
    assert process.score_weights(0.0).equal(torch.ones(50))
    assert process.measured_as == prediction_type
    assert process.convert(x_t, x_t, process.levels, prediction_type, process.measured_as) is x_t
