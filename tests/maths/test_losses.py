"""The losses are means over elements, per sample."""

import pytest
import torch

from dmm.maths.losses import consistency_loss, feature_loss, score_loss


def test_equal_predictions_cost_nothing_and_a_unit_difference_one():
    a = torch.randn(3, 4, 8, 8)
    assert score_loss(a, a).tolist() == [0, 0, 0]
    torch.testing.assert_close(score_loss(a, a + 1), torch.ones(3))


def test_a_sample_costs_the_same_in_any_batch_and_at_any_size():
    a, b = torch.randn(2, 3, 4, 8, 8)
    torch.testing.assert_close(score_loss(a, b)[1:2], score_loss(a[1:2], b[1:2]))
    tiled = (a.repeat(1, 1, 2, 2), b.repeat(1, 1, 2, 2))
    torch.testing.assert_close(score_loss(*tiled), score_loss(a, b))


def test_features_are_summed_over_blocks():
    student = {"down": torch.zeros(2, 3, 4, 4), "mid": torch.zeros(2, 5, 2, 2), "up": torch.zeros(2, 3, 4, 4)}
    teacher = {"down": torch.ones(2, 3, 4, 4), "mid": torch.full((2, 5, 2, 2), 2.0)}
    assert feature_loss(student, teacher).tolist() == [5, 5]


def test_a_block_that_the_student_lacks_is_an_error():
    with pytest.raises(ValueError, match="up"):
        feature_loss({"down": torch.zeros(1, 1, 1, 1)}, {"up": torch.zeros(1, 1, 1, 1)})
    with pytest.raises(ValueError, match="no block"):
        feature_loss({"down": torch.zeros(1, 1, 1, 1)}, {})


def test_small_differences_survive_half_precision():
    a = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    assert score_loss(a, a + 1e-4).item() > 0


def test_the_loss_is_square_for_small_differences_and_straight_for_large_ones():
    target = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert consistency_loss(target, target).abs().max() < 1e-9
    torch.testing.assert_close(consistency_loss(target + 5, target), torch.full((3,), 5.0), rtol=1e-3, atol=1e-3)
    small = consistency_loss(target.double() + 1e-5, target.double(), width=1e-2)
    torch.testing.assert_close(small, torch.full((3,), 5e-9), rtol=0.5, atol=1e-9)
