"""A student learns from frozen teachers, each in its own style."""

import copy
from dataclasses import replace

import pytest
import torch
from distill_helpers import NAMES, new_batch, new_teachers, new_unet

from dmm.families.anatomy import unet_blocks
from dmm.families.sd1 import SD1
from dmm.maths.diffusion import convert_prediction
from dmm.maths.schedules import timesteps_of_equal_power
from dmm.models.features import BlockTap
from dmm.models.student import StyledStudent
from dmm.models.styles import StylePrompts, styled_port
from dmm.models.teachers import freeze
from dmm.training.distill import Batch, Part, Teacher, distill


@pytest.fixture
def student():
    unet = new_unet(0)
    return StyledStudent(unet, StylePrompts(NAMES, dim=unet.time_embedding.linear_2.out_features), SD1)


def test_the_blocks_are_every_down_block_the_mid_block_and_every_up_block(student):
    names = list(unet_blocks(student.unet))
    depth = len(student.unet.config.block_out_channels)
    downs, ups = [f"down_blocks.{i}" for i in range(depth)], [f"up_blocks.{i}" for i in range(depth)]
    assert names == [*downs, "mid_block", *ups]
    batch = new_batch(student)
    output = student(batch.x_t, batch.timesteps, batch.conditioning, batch.style_weights)
    assert list(output.features) == names
    assert all(value.ndim == 4 and len(value) == 8 for value in output.features.values())


def test_a_fresh_student_with_the_style_skipped_equals_its_base_bit_for_bit(student):
    batch = new_batch(student)
    call = (batch.x_t, batch.timesteps, batch.conditioning["encoder_hidden_states"])
    with torch.no_grad():
        assert torch.equal(student.unet(*call).sample, new_unet(0)(*call).sample)


def test_the_term_is_cleared_after_every_call_even_a_failed_one(student):
    batch = new_batch(student)
    student(batch.x_t, batch.timesteps, batch.conditioning, batch.style_weights)
    assert styled_port(student.unet).term is None
    with pytest.raises(TypeError):
        student(batch.x_t, batch.timesteps, {"nonsense": batch.x_t}, batch.style_weights)
    assert styled_port(student.unet).term is None


def test_a_student_of_its_own_weights_has_nothing_to_learn(student):
    teacher = Teacher(freeze(copy.deepcopy(new_unet(0))), "epsilon", "epsilon")
    torch.nn.init.zeros_(student.style_prompts.linear_2.weight)
    torch.nn.init.zeros_(student.style_prompts.linear_2.bias)
    result = distill(student, [teacher, teacher], new_batch(student), feature_weight=1.0)
    assert result.loss.item() < 1e-10


def test_teachers_get_no_gradient_and_stay_in_eval(student):
    teachers = new_teachers()
    distill(student, teachers, new_batch(student), feature_weight=0.1).loss.backward()
    for teacher in teachers:
        assert not any(module.training for module in teacher.denoiser.modules())
        assert all(p.grad is None and not p.requires_grad for p in teacher.denoiser.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert (student.style_prompts.embeddings.grad.norm(dim=1) > 0).all()


def test_scores_weigh_what_their_samples_say_and_other_terms_do_not(student):
    batch = new_batch(student)
    weights = torch.linspace(0.5, 3, len(batch.x_t))
    plain = distill(student, new_teachers(), batch, feature_weight=0.1)
    found = distill(student, new_teachers(), replace(batch, score_weights=weights), feature_weight=0.1)
    for term, values in plain.terms.items():
        torch.testing.assert_close(found.terms[term], values)  # what is logged is not weighted
    expected = (weights * plain.terms["score"] + 0.1 * plain.terms["feature"]) @ batch.loss_weights
    torch.testing.assert_close(found.loss.detach(), expected)


def test_each_sample_is_compared_with_its_own_teacher(student):
    teachers = new_teachers()
    batch = new_batch(student)
    whole = distill(student, teachers, batch, feature_weight=0.1)
    for part in batch.parts:
        alone = Batch(
            x_t=batch.x_t[part.samples],
            timesteps=batch.timesteps[part.samples],
            levels=batch.levels[part.samples],
            style_weights=batch.style_weights[part.samples],
            conditioning={name: value[part.samples] for name, value in batch.conditioning.items()},
            loss_weights=batch.loss_weights[part.samples],
            score_weights=batch.score_weights[part.samples],
            parts=[Part(part.teacher, slice(0, 4), part.conditioning)],
            process=batch.process,
        )
        single = distill(student, teachers, alone, feature_weight=0.1)
        for term, values in single.terms.items():
            torch.testing.assert_close(values, whole.terms[term][part.samples])


def test_the_loss_is_the_weighted_sum_of_its_terms(student):
    result = distill(student, new_teachers(), new_batch(student), feature_weight=0.3)
    expected = (result.terms["score"] + 0.3 * result.terms["feature"]).mean()
    torch.testing.assert_close(result.loss.detach(), expected)
    assert "feature" not in distill(student, new_teachers(), new_batch(student), feature_weight=0).terms


def test_a_velocity_teacher_is_converted_and_its_last_block_left_out(student):
    batch = new_batch(student)
    epsilon, velocity = new_teachers(("epsilon", "v_prediction"))
    call = (batch, Part(0, slice(None), batch.conditioning))
    prediction, features = velocity(*call)
    raw = velocity.denoiser(batch.x_t, batch.timesteps, **batch.conditioning).sample
    expected = convert_prediction(raw, batch.x_t, batch.levels, "v_prediction", "epsilon")
    torch.testing.assert_close(prediction, expected)
    depth = len(student.unet.config.block_out_channels)
    assert set(epsilon(*call)[1]) - set(features) == {f"up_blocks.{depth - 1}"}
    assert torch.isfinite(distill(student, [epsilon, velocity], batch, feature_weight=0.1).loss)


def test_nothing_is_caught_outside_of_a_catch(student):
    tap = BlockTap(student.unet)
    batch = new_batch(student)
    student.unet(batch.x_t, batch.timesteps, batch.conditioning["encoder_hidden_states"])
    with tap.catch() as features:
        pass
    assert features == {}


def test_a_toy_student_overfits_two_toy_teachers(student):
    teachers, optimizer = new_teachers(), torch.optim.AdamW(student.parameters(), 3e-3)
    batch = new_batch(student)
    first = distill(student, teachers, batch, feature_weight=0.1).terms["score"]
    for _ in range(100):
        optimizer.zero_grad()
        distill(student, teachers, batch, feature_weight=0.1).loss.backward()
        optimizer.step()
    last = distill(student, teachers, batch, feature_weight=0.1).terms["score"]
    assert (last < 0.2 * first.mean()).all()


def test_a_teacher_of_another_schedule_is_asked_where_its_own_has_equal_signal(student):
    batch = new_batch(student)
    betas = torch.linspace(0.001**0.5, 0.02**0.5, 1000) ** 2
    other = (1 - betas).cumprod(0)
    unet = freeze(new_unet(1))
    at = timesteps_of_equal_power(batch.levels, other)
    said, _ = Teacher(unet, "epsilon", "epsilon", other)(batch, Part(0, slice(None), batch.conditioning))
    assert said.equal(unet(batch.x_t, at, **batch.conditioning).sample)
    assert not said.equal(unet(batch.x_t, batch.timesteps, **batch.conditioning).sample)
