"""What a merge takes, for the numbers that the docs give of SD 1.5."""

import pytest

from dmm.training.costs import Sizes, checkpoint_bytes, disk_bytes, student_bytes, teacher_bytes

SD15 = Sizes(denoiser=859_520_964, style_prompts=3_289_600, readers=206_714_571, backbone=300_000_000, head=1_000_000)
ALONE = Sizes(denoiser=859_520_964, style_prompts=3_289_600, readers=206_714_571)


def test_the_student_has_weights_gradients_and_two_moments():
    assert student_bytes(ALONE, averaged=False) == 16 * ALONE.student
    assert student_bytes(ALONE, averaged=True) == 20 * ALONE.student
    assert student_bytes(SD15, averaged=False) - student_bytes(ALONE, averaged=False) == 16 * SD15.head


def test_what_is_frozen_is_as_wide_as_the_precision():
    assert teacher_bytes(ALONE, num_teachers=8, half=True) == pytest.approx(13.8e9, rel=0.01)
    assert teacher_bytes(ALONE, num_teachers=8, half=False) == 32 * ALONE.denoiser
    assert teacher_bytes(SD15, num_teachers=0, half=True) == 600_000_000


def test_a_checkpoint_has_the_state_and_the_disk_one_more_than_are_kept():
    assert checkpoint_bytes(ALONE, averaged=False) == pytest.approx(10.35e9, rel=0.01)
    assert checkpoint_bytes(ALONE, averaged=True) == pytest.approx(13.8e9, rel=0.01)
    result = 4 * (ALONE.student + ALONE.readers)
    assert disk_bytes(ALONE, keep=3, averaged=False) == 4 * checkpoint_bytes(ALONE, averaged=False) + result
