"""With LCM's settings the loss is LCM's, put together from diffusers' own parts; and the student learns it."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMScheduler, LCMScheduler
from test_paths import paths

from dmm.families.sd1 import SD1
from dmm.models.few_step import FewStepStudent, add_told, new_fast
from dmm.models.styles import StylePrompts
from dmm.models.teachers import freeze
from dmm.training.few_step import Consistency

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def new_student(seed=0, *, told=False, fast=False):
    torch.manual_seed(seed)
    unet, prompts = tiny_unet(), StylePrompts(("ink", "photo"), dim=32)
    if told:
        add_told(unet, SD1)
    return FewStepStudent(unet, prompts, SD1, fast=new_fast(unet, 2, seed=0) if fast else None)


def say(student, x, t, text, weights):
    return student(x, t, text, weights)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_with_lcms_settings_the_loss_is_lcms(guidance, prediction_type):
    student, teacher = new_student(0), freeze(new_student(1))
    averages = {name: parameter + 0.01 for name, parameter in student.named_parameters()}
    target_network = new_student(0)
    target_network.load_state_dict(averages)
    (batch,) = paths(draws_gamma=False, guidance=(guidance, guidance)).of_step(0)
    lesson = Consistency(student, teacher, prediction_type)
    found = lesson(student, batch, averages)

    ddim = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type=prediction_type, set_alpha_to_one=False)
    ddim.set_timesteps(50)
    lcm = LCMScheduler(**SCHEDULE)
    expected = []
    for i in range(12):
        one = slice(i, i + 1)
        x_t, t, s = batch.x_t[one], batch.timesteps[one], batch.earlier[one]
        weights = batch.style_weights[one]
        text = {"encoder_hidden_states": batch.conditioning["encoder_hidden_states"][one]}
        empty = {"encoder_hidden_states": batch.unconditional["encoder_hidden_states"][one]}
        conditional, unconditional = (say(teacher, x_t, t, words, weights) for words in (text, empty))
        guided = unconditional + guidance * (conditional - unconditional)
        x_s = ddim.step(guided, int(t), x_t).prev_sample

        def consistent(network, x, at, text=text, weights=weights):
            output = say(network, x, at, text, weights)
            step = ddim.step(output, int(at), x)
            c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(at)
            return c_skip * x + c_out * step.pred_original_sample

        difference = consistent(student, x_t, t) - consistent(target_network, x_s, s)
        expected.append((torch.sqrt(difference**2 + 0.001**2) - 0.001).mean())
    torch.testing.assert_close(found.terms["consistency"], torch.stack(expected), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.loss, torch.stack(expected).mean(), rtol=1e-3, atol=1e-4)


def test_gradients_reach_the_student_alone():
    student, teacher = new_student(0, told=True), freeze(new_student(1))
    (batch,) = paths(guidance=(2.0, 5.0)).of_step(0)
    averages = {name: parameter.detach().clone().requires_grad_() for name, parameter in student.named_parameters()}
    Consistency(student, teacher, "epsilon")(student, batch, averages).loss.backward()
    assert student.unet.time_embedding.cond_proj.weight.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(tensor.grad is None for tensor in averages.values())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@torch.no_grad()
def test_between_two_points_an_untrained_student_differs_from_its_target_less_than_at_the_first():
    """What a sub-path is for: its points are easier to lead on, the nearer to their end."""
    student, lesson = new_student(0), Consistency(new_student(0), freeze(new_student(0)), "epsilon")
    averages = dict(student.named_parameters())
    batches = [next(iter(paths(guidance=(1.0, 1.0), draws_gamma=draws).of_step(0))) for draws in (True, False)]
    splam, lcm = (lesson(student, batch, averages).terms["consistency"] for batch in batches)
    assert splam.mean() < 0.8 * lcm.mean()
    at_its_end = replace(batches[0], gamma=torch.full((12,), 1e-4), between=batches[0].earlier.float())
    assert lesson(student, at_its_end, averages).terms["consistency"].max() < 1e-2 * lcm.max()


@pytest.mark.parametrize("fast", [False, True])
def test_a_student_learns_what_its_teacher_does_in_a_step(fast):
    student = new_student(0, fast=fast)
    teacher = student if fast else freeze(new_student(0))
    lesson = Consistency(student, teacher, "epsilon")
    (batch,) = paths(guidance=(4.0, 4.0)).of_step(0)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3 if fast else 3e-4)
    target = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    losses = []
    for _ in range(30):
        loss = lesson(student, batch, target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
