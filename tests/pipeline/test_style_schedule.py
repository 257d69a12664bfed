"""Style over time: each part of a run in its own style."""

import numpy as np
import pytest
import torch
from conftest import tiny_styled
from diffusers import StableDiffusionImg2ImgPipeline
from helpers import paint
from PIL import Image

import dmm
from dmm.errors import UserError
from dmm.models.styles import styled_port
from dmm.pipeline.samplers import SAMPLERS
from dmm.pipeline.sampling import build_scheduler, sample
from dmm.pipeline.style_schedule import StyleSchedule
from dmm.pipeline.styled import set_style, stock_twin, style_over_time

MIX = {"photo": 0.5, "clay": 0.5}
INK_THEN_MIX = StyleSchedule([(0, 0.5, "ink"), (0.5, 1, MIX)])


def latents(pipe, **inputs):
    """Of a run in four steps: finer than pixels, on which the last steps have little left to do."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=generator, num_inference_steps=4, output_type="latent", **inputs).images


def test_step_i_of_n_is_at_i_over_n():
    schedule = StyleSchedule([(0, 0.4, "a"), (0.4, 0.8, {"a": 0.5, "b": 0.5}), (0.8, 1, None)])
    told = [schedule.at(i / 25) for i in range(25)]
    assert told == ["a"] * 10 + [{"a": 0.5, "b": 0.5}] * 10 + [None] * 5


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "these end at 0"),
        ([(0, 0.5, "a")], "these end at 0.5"),
        ([(0.1, 1, "a")], "begins at 0.1 where 0 was expected"),
        ([(0, 0.5, "a"), (0.6, 1, "b")], "begins at 0.6 where 0.5 was expected"),
        ([(0, 0.5, "a"), (0.4, 1, "b")], "begins at 0.4 where 0.5 was expected"),
        ([(0, 0, "a"), (0, 1, "b")], "0-0 does not"),
        ([(0, 1.5, "a")], "0-1.5 does not"),
        ([(0, float("nan"), "a")], "0-nan does not"),
    ],
)
def test_parts_follow_each_other_from_0_to_1(parts, message):
    with pytest.raises(UserError, match=message):
        StyleSchedule(parts)


def test_each_part_paints_as_the_model_baked_in_its_style(styled):
    # the reference changes whole models in the middle of the run
    first, second = stock_twin(tiny_styled(), "ink"), stock_twin(tiny_styled(), MIX)
    second_unet = second.unet

    def change(running, step, _timestep, tensors):
        if step == 1:
            running.unet = second_unet
        return tensors

    for pipe in (styled, first):
        pipe.scheduler = build_scheduler(pipe.scheduler.config)
    expected = latents(first, callback_on_step_end=change)
    with style_over_time(styled, INK_THEN_MIX) as callback:
        runs = [latents(styled, callback_on_step_end=callback) for _ in range(2)]
    torch.testing.assert_close(runs[0], expected, rtol=0, atol=1e-4)
    assert runs[0].equal(runs[1])
    for style in ("ink", MIX):
        set_style(styled, style)
        assert (latents(styled) - runs[0]).abs().max() > 1e-2


def test_the_style_that_was_set_is_set_again_even_after_an_error(styled):
    set_style(styled, "photo")
    before = styled_port(styled.unet).term

    def fail(running, step, timestep, tensors):
        if step == 2:
            raise KeyError
        return callback(running, step, timestep, tensors)

    with pytest.raises(KeyError), style_over_time(styled, INK_THEN_MIX) as callback:
        paint(styled, steps=4, callback_on_step_end=fail)
    assert styled_port(styled.unet).term is before


def test_an_error_in_the_middle_of_sampling_leaves_the_style_as_it_was_set(styled):
    set_style(styled, "photo")
    before = styled_port(styled.unet).term
    calls = []

    def fail(share):
        calls.append(share)
        if len(calls) == 3:
            raise KeyError

    with pytest.raises(KeyError):
        list(sample(styled, ["a cat"] * 2, [0, 1], styles=["ink", INK_THEN_MIX], steps=4, progress=fail))
    assert styled_port(styled.unet).term is before


def test_every_image_may_have_a_schedule_of_its_own(styled):
    styles = [INK_THEN_MIX, "clay", StyleSchedule([(0, 0.25, None), (0.25, 1, "photo")]), None]
    together = list(sample(styled, ["a cat"] * 4, [1, 2, 3, 4], styles=styles, steps=4))
    for i, style in enumerate(styles):
        (alone,) = sample(styled, ["a cat"], [i + 1], styles=[style], steps=4)
        assert abs(np.asarray(alone, dtype=int) - np.asarray(together[i], dtype=int)).max() <= 1


def test_a_run_that_begins_with_an_image_is_divided_as_it_is_run(styled):
    styled.scheduler = build_scheduler(styled.scheduler.config)
    painter = StableDiffusionImg2ImgPipeline.from_pipe(styled)
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    seen = []

    def watch(running, step, timestep, tensors):
        seen.append(styled_port(running.unet).term)
        return callback(running, step, timestep, tensors)

    with style_over_time(styled, INK_THEN_MIX) as callback:
        paint(painter, image=image, strength=0.5, steps=8, callback_on_step_end=watch)
    assert len(seen) == 4
    assert seen[0] is seen[1]
    assert seen[1] is not seen[2]
    assert seen[2] is seen[3]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_part_is_the_style_itself_with_any_sampler(styled, sampler):
    one = list(sample(styled, ["a cat"], [0], styles=[StyleSchedule([(0, 1, "ink")])], steps=3, sampler=sampler))
    other = list(sample(styled, ["a cat"], [0], styles=["ink"], steps=3, sampler=sampler))
    assert one[0].tobytes() == other[0].tobytes()


@pytest.mark.parametrize(("style", "message"), [("inc", "no style 'inc'"), ({"ink": 0.5}, "sum to 0.5")])
def test_all_parts_are_checked_before_anything_is_painted(styled, style, message):
    with (
        pytest.raises(UserError, match=message),
        style_over_time(styled, StyleSchedule([(0, 0.5, "ink"), (0.5, 1, style)])),
    ):
        pass


def test_it_is_part_of_the_public_api():
    assert dmm.StyleSchedule is StyleSchedule
    assert dmm.style_over_time is style_over_time
