"""The discriminator sees bounded latents, stays frozen while the student learns, and learns to tell them apart."""

import dataclasses

import pytest
import torch
from conftest import tiny_unet
from distill_helpers import NAMES, new_batch, new_teachers
from toy import ALPHAS_CUMPROD

from dmm.families.sd1 import SD1
from dmm.maths.diffusion import add_noise, epsilon_to_velocity, predict_x0, rediffuse
from dmm.maths.draws import draw_again
from dmm.maths.losses import adversarial_loss, discriminator_loss
from dmm.models.discriminator import Discriminator, build_head
from dmm.models.student import StyledStudent
from dmm.models.styles import StylePrompts
from dmm.training.distill import Adversary, Rediffusion, discriminate, distill


@pytest.fixture
def student():
    torch.manual_seed(0)
    unet = tiny_unet()
    return StyledStudent(unet, StylePrompts(NAMES, dim=unet.time_embedding.linear_2.out_features), SD1)


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return Discriminator(tiny_unet(), len(NAMES))


def batch_to_judge(student, seed=0):
    batch = new_batch(student, seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch.x_t.shape, generator=generator)
    again = Rediffusion(batch.timesteps, batch.levels / 2, noise)
    return dataclasses.replace(batch, again=again)


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_what_is_diffused_again_is_the_clean_prediction_noised():
    generator = torch.Generator().manual_seed(0)
    x_t, output, noise = torch.randn(3, 4, 2, 8, 8, generator=generator, dtype=torch.float64)
    alpha_bar_t, alpha_bar_s = (
        torch.tensor([0.9, 0.5, 0.2, 0.01]).double(),
        torch.tensor([0.9, 0.2, 0.1, 0.005]).double(),
    )
    expected = add_noise(predict_x0(output, x_t, alpha_bar_t), noise, alpha_bar_s)
    torch.testing.assert_close(rediffuse(output, x_t, alpha_bar_t, noise, alpha_bar_s, "epsilon"), expected)
    velocity = epsilon_to_velocity(output, x_t, alpha_bar_t)
    torch.testing.assert_close(rediffuse(velocity, x_t, alpha_bar_t, noise, alpha_bar_s, "v_prediction"), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", [ALPHAS_CUMPROD, torch.cat([ALPHAS_CUMPROD[:-1], torch.zeros(1)])])
def test_an_error_of_the_prediction_is_never_magnified(schedule, prediction_type):
    timesteps = torch.tensor([0, 500, 990, 999])
    later, noise = draw_again(0, 0, range(4), timesteps=timesteps, latent_shape=(2, 8, 8), num_timesteps=1000)
    x_t = torch.randn(4, 2, 8, 8)
    output = torch.zeros_like(x_t)
    calls = [
        rediffuse(said, x_t, schedule[timesteps], noise, schedule[later], prediction_type)
        for said in (output, output + 1)
    ]
    assert (calls[0] - calls[1]).abs().max() <= 1.0001
    assert calls[0].isfinite().all()


def test_the_second_draw_is_later_never_earlier_and_of_a_stream_of_its_own():
    timesteps = torch.arange(0, 1000, 5)
    call = {"timesteps": timesteps, "latent_shape": (4, 4, 4), "num_timesteps": 1000}
    later, noise = draw_again(0, 3, range(200), **call)
    assert (later >= timesteps).all()
    assert (later < 1000).all()
    assert (later > timesteps).float().mean() > 0.9
    assert draw_again(0, 3, range(100, 200), **call | {"timesteps": timesteps[100:]})[1].equal(noise[100:])
    assert not draw_again(0, 4, range(200), **call)[1].equal(noise)


def test_teachers_are_the_first_classes_and_the_student_the_others():
    styles = torch.tensor([0, 1])
    sure = 20 * torch.eye(4)
    assert (discriminator_loss(sure[[2, 3]], sure[[0, 1]], styles) < 1e-6).all()
    assert (discriminator_loss(sure[[0, 1]], sure[[2, 3]], styles) > 10).all()
    assert (adversarial_loss(sure[[0, 1]], styles) < 1e-6).all()
    assert (adversarial_loss(sure[[2, 3]], styles) > 10).all()


def test_the_head_judges_any_size():
    head = build_head(32, num_styles=3)
    for side in (1, 2, 7):
        assert head(torch.randn(2, 32, side, side)).shape == (2, 6)


def test_the_backbone_is_the_bases_up_to_its_middle_block(discriminator):
    torch.manual_seed(0)
    unet = tiny_unet()
    x, timesteps, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 6, 16)
    caught = []
    unet.mid_block.register_forward_hook(lambda module, inputs, output: caught.append(output))
    unet(x, timesteps, text)
    assert discriminator.look(x, timesteps, {"encoder_hidden_states": text}).equal(caught[0])
    assert unet.up_blocks  # of the original, nothing is taken
    assert not any(parameter.requires_grad for parameter in discriminator.backbone.parameters())


def test_each_update_moves_one_side_only(student, discriminator):
    adversary = Adversary(discriminator, 1.0, "epsilon")
    result = distill(student, new_teachers(), batch_to_judge(student), feature_weight=0, adversary=adversary)
    result.loss.backward()
    assert "unet.conv_in.weight" in gradients(student)
    assert not gradients(discriminator)
    student.zero_grad(set_to_none=True)
    discriminate(discriminator.head, result.seen).loss.backward()
    assert not gradients(student)
    assert gradients(discriminator).keys() == {f"head.{name}" for name, _ in discriminator.head.named_parameters()}


def test_the_term_is_what_the_discriminator_makes_of_the_student(student, discriminator):
    batch, teachers = batch_to_judge(student), new_teachers()
    with_it = distill(student, teachers, batch, feature_weight=0.1, adversary=Adversary(discriminator, 0.5, "epsilon"))
    without = distill(student, teachers, batch, feature_weight=0.1)
    for name in ("score", "feature"):
        assert with_it.terms[name].equal(without.terms[name])
    torch.testing.assert_close(
        with_it.loss - without.loss,
        (0.5 * with_it.terms["adversarial"] * batch.loss_weights).sum(),
        rtol=1e-3,
        atol=1e-5,
    )


def test_it_learns_to_tell_the_student_from_its_teachers(student, discriminator):
    adversary = Adversary(discriminator, 0.01, "epsilon")
    teachers = new_teachers()
    seen = distill(student, teachers, batch_to_judge(student), feature_weight=0, adversary=adversary).seen
    optimizer = torch.optim.AdamW(discriminator.head.parameters(), lr=1e-2)
    for _ in range(300):
        result = discriminate(discriminator.head, seen)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    after = discriminate(discriminator.head, seen).terms
    assert after["discriminator"].mean() < 0.5
    assert after["discriminator_student_accuracy"].mean() == after["discriminator_teacher_accuracy"].mean() == 1
