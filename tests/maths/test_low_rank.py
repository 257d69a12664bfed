import pytest
import torch

from dmm.maths.low_rank import (
    deal_ranks,
    input_components,
    output_components,
    plain_components,
)


def layer(rows=7, columns=11, samples=400, seed=0):
    """A difference, and inputs and gradients whose directions are far from even."""
    generator = torch.Generator().manual_seed(seed)
    difference = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, columns)
    gradients = torch.randn(samples, rows, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, rows)
    return difference, inputs, gradients


def covariance(rows):
    return rows.T @ rows / len(rows)


def moved(left, inputs, gradients):
    """What is left of a difference moves the output by: E over inputs and gradients of (g^T D x)^2."""
    return float((gradients @ left @ inputs.T).square().mean())


@pytest.fixture
def found():
    difference, inputs, gradients = layer()
    by_output = output_components(difference, covariance(inputs @ difference.T), covariance(gradients), damping=0.0)
    return difference, inputs, gradients, by_output


def test_all_components_are_the_difference(found):
    difference, _, _, components = found
    torch.testing.assert_close(components.up @ components.down, difference.float(), rtol=1e-4, atol=1e-4)


def test_gains_are_what_the_output_moves_less(found):
    difference, inputs, gradients, components = found
    whole = moved(difference, inputs, gradients)
    assert components.gains.sum() == pytest.approx(whole, rel=1e-6)
    for rank in range(7):
        cut = components.cut(rank)
        left = moved(difference - (cut.up @ cut.down).double(), inputs, gradients)
        assert left == pytest.approx(whole - float(cut.gains.sum()), rel=1e-4, abs=1e-6 * whole)


def test_no_other_factors_of_that_rank_leave_less(found):
    difference, inputs, gradients, components = found
    plain = plain_components(difference)
    for rank in (1, 2, 4):
        ours, theirs = (difference - (one.cut(rank).up @ one.cut(rank).down).double() for one in (components, plain))
        assert moved(ours, inputs, gradients) < 0.5 * moved(theirs, inputs, gradients)


def test_both_sides_find_the_same(found):
    difference, inputs, gradients, by_output = found
    by_input = input_components(difference, covariance(inputs), covariance(gradients @ difference), damping=0.0)
    torch.testing.assert_close(by_input.gains, by_output.gains, rtol=1e-6, atol=1e-6)
    for rank in (1, 3):
        one, other = by_input.cut(rank), by_output.cut(rank)
        torch.testing.assert_close(one.up @ one.down, other.up @ other.down, rtol=1e-4, atol=1e-4)


def test_plain_components_are_the_singular_vectors():
    difference, _, _ = layer()
    for matrix in (difference, difference.T):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = plain_components(matrix).cut(3)
        torch.testing.assert_close(found.gains, values[:3].square())
        expected = (left[:, :3] * values[:3] @ right[:3]).float()
        torch.testing.assert_close(found.up @ found.down, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_nothing_reaches_has_nothing_to_gain():
    zeros = torch.zeros(3, 3)
    assert output_components(torch.randn(3, 5), zeros, zeros).gains.sum() == 0


GAINS = [
    {"wide": torch.tensor([8.0, 4.0, 1.0]).double(), "thin": torch.tensor([1.0, 0.5]).double()},
    # the same style, only that all its gains are told in other units
    {"wide": torch.tensor([80.0, 40.0, 10.0]).double(), "thin": torch.tensor([10.0, 5.0]).double()},
]
COSTS = {"wide": 4, "thin": 1}


def test_the_best_bargains_are_dealt_first():
    # by parameter: wide 2, 1, 1/4; thin 1, 1/2
    assert deal_ranks(GAINS[:1], COSTS, 4) == [{"wide": 1}]
    assert deal_ranks(GAINS[:1], COSTS, 9) == [{"wide": 2, "thin": 1}]
    assert deal_ranks(GAINS[:1], COSTS, 1000) == [{"wide": 3, "thin": 2}]


def test_styles_of_different_size_get_alike():
    dealt = deal_ranks(GAINS, COSTS, 18)
    assert dealt == [{"wide": 2, "thin": 1}] * 2


def test_no_more_is_dealt_than_there_is():
    for budget in range(30):
        dealt = deal_ranks(GAINS, COSTS, budget)
        assert sum(COSTS[layer] * rank for ranks in dealt for layer, rank in ranks.items()) <= budget
