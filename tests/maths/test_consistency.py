"""A sub-path's ends are the teacher's points, between them is one noise, and f is the identity at t = 0."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dmm.maths.consistency import (
    as_noised,
    clean_and_noise,
    consistent,
    embed_guidance,
    guide,
    path_timesteps,
    steps_to_pass,
    sub_path_noise,
    sub_path_point,
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


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_all_of_a_sub_path_is_its_trajectorys_clean_latents_and_noise(gamma):
    x_0, noise, x_t, x_s = on_one_trajectory()
    gammas = torch.full((3,), gamma)
    signal, spread = (one.sqrt().reshape(-1, 1, 1, 1) for one in (T, sub_path_noise(gammas, T, S)))
    point = sub_path_point(x_t, x_s, gammas, T, S)
    torch.testing.assert_close(point, signal * x_0 + spread * noise)
    torch.testing.assert_close((point - spread * noise) / signal, x_0, rtol=1e-4, atol=1e-4)  # as SPLAM has it


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_sub_paths_point_is_noised_latents_at_another_level(gamma, prediction_type):
    x_0, noise, x_t, x_s = on_one_trajectory()
    gammas = torch.full((3,), gamma)
    x, level = as_noised(sub_path_point(x_t, x_s, gammas, T, S), T, sub_path_noise(gammas, T, S))
    torch.testing.assert_close(x, add_noise(x_0, noise, level))
    assert ((level >= T - 1e-6) & (level <= S + 1e-6)).all()
    said = noise if prediction_type == "epsilon" else epsilon_to_velocity(noise, x, level)
    torch.testing.assert_close(clean_and_noise(said, x, level, prediction_type)[0], x_0, rtol=1e-4, atol=1e-4)


def test_where_a_sub_path_begins_and_ends_its_levels_are_the_teachers():
    x_t, x_s = randn(0), randn(1)
    for gamma, at, level in ((torch.ones(3), x_t, T), (torch.zeros(3), x_s, S)):
        found = as_noised(sub_path_point(x_t, x_s, gamma, T, S), T, sub_path_noise(gamma, T, S))
        torch.testing.assert_close(found, (at, level))


def test_in_pure_noise_a_sub_path_is_pure_noise():
    nothing, gamma = torch.zeros(3), torch.tensor([2**-24, 0.5, 1.0])
    x, level = as_noised(
        sub_path_point(randn(0), randn(1), gamma, nothing, S), nothing, sub_path_noise(gamma, nothing, S)
    )
    torch.testing.assert_close(x, randn(0))
    assert level.tolist() == [0, 0, 0]


def test_at_time_zero_the_function_is_the_identity_and_later_what_is_predicted():
    x_0, x_t = randn(0), randn(1)
    assert torch.equal(consistent(x_0, x_t, torch.zeros(3)), x_t)
    torch.testing.assert_close(consistent(x_0, x_t, torch.full((3,), 999)), x_0, rtol=1e-5, atol=1e-5)


def test_guidance_is_embedded_as_stock_pipelines_do():
    stock = StableDiffusionPipeline.get_guidance_scale_embedding
    scales = torch.tensor([1.0, 3.5, 8.0])
    torch.testing.assert_close(embed_guidance(scales, 64), stock(None, scales - 1, embedding_dim=64))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_what_is_learnt_passes_from_a_paths_end_to_its_beginning_in_as_many_steps_as_are_told(decay):
    num_points, steps = 30, 0
    student = average = torch.zeros(num_points)
    while student[-1] < 0.5:
        student = torch.cat([torch.ones(1), average[:-1]])  # learns at once, and knows where the path ends
        average = torch.lerp(average, student, 1 - (decay or 0))
        steps += 1
    assert steps == pytest.approx(steps_to_pass(num_points, decay), rel=0.05)
