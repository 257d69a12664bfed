"""What a merge's weights take, for the numbers that the docs give of SD 1.5."""

import pytest

from dmm.recipes.recipe import Recipe
from dmm.training.costs import Sizes
from dmm.training.merge_costs import checkpoint_bytes, disk_parts, student_bytes, training_parts

SD15 = Sizes(
    denoiser=859_520_964,
    style_prompts=3_289_600,
    readers=206_714_571,
    backbone=300_000_000,
    head=1_000_000,
    num_styles=8,
)
ALONE = Sizes(denoiser=859_520_964, style_prompts=3_289_600, readers=206_714_571, num_styles=8)
ADAPTED = Sizes(
    denoiser=859_520_964, style_prompts=0, readers=206_714_571, num_styles=8, adapter=17_000_000, calibrated=120_000_000
)
LEARNT = ALONE.denoiser + ALONE.style_prompts


def recipe(**keys):
    named = {
        "styles": {"rank": 0},
        "base": "o/m",
        "teachers": [{"name": "ink", "model": "o/m"}],
        "data": {"dataset": "d"},
    }
    return Recipe.model_validate(named | keys)


PLAIN, AVERAGED, FULL = (
    recipe(),
    recipe(training={"ema_decay": 0.9}),
    recipe(training={"precision": "fp32"}),
)
RANK_16 = recipe(styles={"rank": 16})


def test_the_student_has_weights_gradients_and_two_moments():
    assert student_bytes(ALONE, PLAIN) == 16 * LEARNT
    assert student_bytes(ALONE, AVERAGED) == 20 * LEARNT
    assert student_bytes(SD15, PLAIN) - student_bytes(ALONE, PLAIN) == 16 * SD15.head


def test_what_is_frozen_is_as_wide_as_the_precision():
    assert training_parts(ALONE, PLAIN, num_teachers=8)["teachers"] == pytest.approx(13.8e9, rel=0.01)
    assert training_parts(ALONE, FULL, num_teachers=8)["teachers"] == 32 * ALONE.denoiser
    assert training_parts(SD15, PLAIN, num_teachers=0)["discriminator"] == 600_000_000 + 4 * SD15.head


def test_adapters_are_trained_on_frozen_weights_in_half_precision_one_at_a_time():
    parts = training_parts(ADAPTED, RANK_16, num_teachers=1)
    assert parts["shared weights"] == parts["teachers"] == 2 * ADAPTED.denoiser
    assert parts["styles"] == parts["gradients"] == 4 * ADAPTED.adapter
    assert parts["moments"] == 8 * ADAPTED.adapter


def test_a_checkpoint_has_the_state_and_the_disk_one_more_than_are_kept():
    assert checkpoint_bytes(ALONE, PLAIN) == pytest.approx(10.35e9, rel=0.01)
    assert checkpoint_bytes(ALONE, AVERAGED) == pytest.approx(13.8e9, rel=0.01)
    parts = disk_parts(ALONE, PLAIN)
    assert parts["checkpoints"] == 4 * checkpoint_bytes(ALONE, PLAIN)
    assert parts["result"] == 4 * (LEARNT + ALONE.readers)


def test_each_adapter_keeps_checkpoints_of_its_own():
    parts = disk_parts(ADAPTED, RANK_16)
    assert parts["checkpoints"] == (8 * 3 + 1) * 12 * ADAPTED.adapter
    assert parts["calibration"] == 4 * 8 * ADAPTED.calibrated
    assert parts["untrained"] == parts["result"] == 4 * ADAPTED.pipeline + 2 * 8 * ADAPTED.adapter
