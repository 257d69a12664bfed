"""Sliders sum to 1 after any moves."""

import random

import pytest

from dmm.app.mixing import random_mix, rebalance, settle


def is_whole(weights):
    return sum(round(100 * weight) for weight in weights) == 100 and all(0 <= weight <= 1 for weight in weights)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 31])
def test_any_moves_sum_to_1_and_leave_the_moved_one_where_it_is(count):
    source = random.Random(count)
    weights = random_mix(count, source)
    assert is_whole(weights)
    for _ in range(500):
        moved = source.randrange(count)
        weights[moved] = source.choice([0.0, 1.0, source.random()])
        at = round(weights[moved], 2)
        weights = rebalance(weights, moved)
        assert is_whole(weights)
        assert weights[moved] == (at if count > 1 else 1.0)


def test_the_others_share_what_is_left_as_they_did():
    assert rebalance([0.4, 0.4, 0.2], 0) == [0.4, 0.4, 0.2]
    assert rebalance([0.1, 0.4, 0.2], 0) == [0.1, 0.6, 0.3]
    assert rebalance([0.5, 0.0, 0.0], 0) == [0.5, 0.25, 0.25]
    assert rebalance([1.0, 0.7, 0.3], 0) == [1.0, 0.0, 0.0]


def test_weights_settle_on_the_nearest_hundredths():
    assert settle([1, 1, 1]) == [0.34, 0.33, 0.33]
    assert settle([0.7, 0.3]) == [0.7, 0.3]
