"""Noise and back again, with timesteps shaped as users pass them."""

import pytest
import torch
from diffusers import DDPMScheduler

from dmm.maths.diffusion import add_noise, convert_prediction, epsilon_to_velocity, predict_x0, velocity_to_epsilon

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(5, 4, 8, 8, generator=generator)
    noise = torch.randn(5, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    return x_0, noise, timesteps, SCHEDULER.alphas_cumprod[timesteps]


def test_noise_and_back_returns_the_input(draw):
    x_0, noise, _, alpha_bar = draw
    torch.testing.assert_close(predict_x0(noise, add_noise(x_0, noise, alpha_bar), alpha_bar), x_0, rtol=0, atol=2e-5)


def test_it_is_the_scheduler_of_diffusers(draw):
    x_0, noise, timesteps, alpha_bar = draw
    x_t = SCHEDULER.add_noise(x_0, noise, timesteps)
    torch.testing.assert_close(add_noise(x_0, noise, alpha_bar), x_t)
    velocity = SCHEDULER.get_velocity(x_0, noise, timesteps)
    torch.testing.assert_close(epsilon_to_velocity(noise, x_t, alpha_bar), velocity, rtol=0, atol=2e-5)
    torch.testing.assert_close(velocity_to_epsilon(velocity, x_t, alpha_bar), noise, rtol=0, atol=2e-5)


@pytest.mark.parametrize("source", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_conversion_and_back_returns_the_prediction(draw, source, target):
    x_0, output, _, alpha_bar = draw
    there = convert_prediction(output, x_0, alpha_bar, source, target)
    torch.testing.assert_close(convert_prediction(there, x_0, alpha_bar, target, source), output, rtol=1e-3, atol=1e-4)
    assert (there is output) == (source == target)


def test_no_clean_latents_where_no_signal_is_left(draw):
    x_0, noise, _, _ = draw
    with pytest.raises(ValueError, match="undefined"):
        predict_x0(noise, x_0, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0]))


def test_half_precision_stays_half_precision(draw):
    x_0, noise, _, alpha_bar = draw
    assert add_noise(x_0.bfloat16(), noise.bfloat16(), alpha_bar).dtype == torch.bfloat16
