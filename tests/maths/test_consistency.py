"""A sub-path's ends are the teacher's points, its middle has the noise that is told, and f is the identity at t = 0."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dmm.maths.consistency import (
    clean_and_noise,
    consistent,
    embed_gamma,
    embed_guidance,
    guide,
    path_timesteps,
    sub_path_noise,
    sub_path_point,
    sub_path_x0,
)
from dmm.maths.diffusion import add_noise, epsilon_to_velocity

SHAPE = (3, 4, 8, 8)
T, S = torch.tensor([0.02, 0.4, 0.9]), torch.tensor([0.03, 0.5, 0.99])


def randn(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def on_one_trajectory():
    """Clean latents, noise, and the two points of the trajectory that they are on."""
    x_0, noise = randn(0), randn(1)
    return x_0, noise, add_noise(x_0, noise, T), add_noise(x_0, noise, S)


def test_the_path_ends_with_the_last_timestep_that_it_divides():
    assert path_timesteps(1000, 20).tolist() == list(range(19, 1000, 20))
    assert path_timesteps(1000, 300).tolist() == [299, 599, 899]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_of_the_teacher_is_that_of_ddim(prediction_type):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=19
    )
    scheduler.register_to_config(prediction_type=prediction_type)
    scheduler.set_timesteps(50)
    output, x_t, alphas = randn(0), randn(1), scheduler.alphas_cumprod
    t = 519
    x_0, noise = clean_and_noise(output, x_t, alphas[t].expand(3), prediction_type)
    ours = add_noise(x_0, noise, alphas[t - 20].expand(3))
    torch.testing.assert_close(ours, scheduler.step(output, t, x_t).prev_sample, rtol=1e-5, atol=1e-5)


def test_guidance_of_one_is_the_conditional_prediction():
    conditional, unconditional = randn(0), randn(1)
    scale = torch.tensor([1.0, 0.0, 3.0])
    guided = guide(conditional, unconditional, scale)
    torch.testing.assert_close(guided[0], conditional[0])
    assert torch.equal(guided[1], unconditional[1])
    torch.testing.assert_close(guided[2] - unconditional[2], 3 * (conditional[2] - unconditional[2]))


def test_the_ends_of_a_sub_path_are_the_teachers_points():
    x_t, x_s = randn(0), randn(1)
    assert torch.equal(sub_path_point(x_t, x_s, torch.ones(3), T, S), x_t)
    ratio = (T / S).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(sub_path_point(x_t, x_s, torch.zeros(3), T, S), ratio * x_s)
    torch.testing.assert_close(sub_path_noise(torch.ones(3), T, S), 1 - T)
    torch.testing.assert_close(sub_path_noise(torch.zeros(3), T, S), (1 - S) * T / S)


def test_the_noise_of_a_sub_path_is_that_of_diffusing_on():
    """x_t is x_s diffused on by fresh noise: the mean of many such sub-paths has the signal of t, their spread s."""
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(200_000, generator=generator)
    first = torch.randn(200_000, generator=generator)
    alpha_bar_t, alpha_bar_s, gamma = torch.tensor([0.3]), torch.tensor([0.6]), torch.tensor([0.4])
    ratio = alpha_bar_t / alpha_bar_s
    x_s = alpha_bar_s.sqrt() * 2 + (1 - alpha_bar_s).sqrt() * first
    x_t = ratio.sqrt() * x_s + (1 - ratio).sqrt() * fresh
    point = sub_path_point(x_t[None], x_s[None], gamma, alpha_bar_t, alpha_bar_s)
    assert point.mean() == pytest.approx(2 * 0.3**0.5, abs=0.01)
    assert point.var() == pytest.approx(float(sub_path_noise(gamma, alpha_bar_t, alpha_bar_s)), abs=0.01)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_at_the_beginning_of_a_sub_path_the_right_prediction_gives_the_clean_latents(prediction_type):
    x_0, noise, x_t, _ = on_one_trajectory()
    said = noise if prediction_type == "epsilon" else epsilon_to_velocity(noise, x_t, T)
    found = sub_path_x0(said, x_t, T, sub_path_noise(torch.ones(3), T, T / 2 + 0.5), prediction_type)
    torch.testing.assert_close(found, x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_within_a_sub_path_the_noise_in_it_gives_the_clean_latents(gamma, prediction_type):
    x_0, noise = randn(0), randn(1)
    gammas = torch.full((3,), gamma)
    power = sub_path_noise(gammas, T, S)
    signal, spread = (one.sqrt().reshape(-1, 1, 1, 1) for one in (T, power))
    x_gamma = signal * x_0 + spread * noise
    whole = (signal**2 + spread**2).sqrt()
    said = noise if prediction_type == "epsilon" else (signal * noise - spread * x_0) / whole
    torch.testing.assert_close(sub_path_x0(said, x_gamma, T, power, prediction_type), x_0, rtol=1e-4, atol=1e-4)


def test_at_time_zero_the_function_is_the_identity_and_later_what_is_predicted():
    x_0, x_t = randn(0), randn(1)
    assert torch.equal(consistent(x_0, x_t, torch.zeros(3)), x_t)
    torch.testing.assert_close(consistent(x_0, x_t, torch.full((3,), 999)), x_0, rtol=1e-5, atol=1e-5)


def test_guidance_is_embedded_as_stock_pipelines_do():
    stock = StableDiffusionPipeline.get_guidance_scale_embedding
    scales = torch.tensor([1.0, 3.5, 8.0])
    torch.testing.assert_close(embed_guidance(scales, 64), stock(None, scales - 1, embedding_dim=64))


def test_where_paths_begin_nothing_is_told_and_near_it_little():
    told = embed_gamma(torch.tensor([1.0, 0.99, 0.5, 0.0]), 256)
    assert told.shape == (4, 256)
    assert told[0].abs().max() == 0
    assert told[1].norm() < 0.1 * told[2].norm()
    assert (told[2] - told[3]).norm() > 1
