"""The methods against straightforward implementations of their papers, and against what must hold."""

import math

import pytest
import torch

from dmm.soup.methods import (
    dare,
    dare_ties,
    gram_matrix,
    kept_above,
    model_stock,
    random_mask,
    slerp,
    task_arithmetic,
    ties,
    weighted_sum,
)


def draws(count, seed=0, num_elements=1000, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_elements, generator=generator, dtype=dtype) for _ in range(count)]


def reference_ties(base, models, weights, density, scale):
    """As the paper's algorithm 1 reads, one element after the other."""
    k = max(1, int(density * len(base)))
    trimmed = []
    for model in models:
        difference = model - base
        threshold = difference.abs().sort(descending=True).values[k - 1]
        trimmed.append(torch.where(difference.abs() >= threshold, difference, 0.0))
    result = base.clone()
    for p in range(len(base)):
        mass = sum(weight * difference[p].item() for weight, difference in zip(weights, trimmed, strict=True))
        sign = math.copysign(1, mass) if mass else 0
        chosen = [
            (weight, difference[p].item())
            for weight, difference in zip(weights, trimmed, strict=True)
            if difference[p].item() * sign > 0
        ]
        if chosen:
            mean = sum(weight * value for weight, value in chosen) / sum(weight for weight, _ in chosen)
            result[p] += scale * mean
    return result


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize(("weights", "scale"), [([1 / 3, 1 / 3, 1 / 3], 1.0), ([0.5, 0.3, 0.2], 0.7)])
def test_ties_is_the_papers(density, weights, scale):
    base, *models = draws(4)
    found = ties(base, models, weights, density=density, scale=scale)
    torch.testing.assert_close(found, reference_ties(base, models, weights, density, scale))


def test_ties_keeps_equal_magnitudes_together():
    base, model = torch.zeros(4), torch.tensor([1.0, -1.0, 0.5, 0.25])
    assert ties(base, [model], [1.0], density=0.25).tolist() == [1, -1, 0, 0]


def test_dare_drops_and_rescales():
    base, *models = draws(3)
    masks = [random_mask((1, i), 0, 1000, 0.3) for i in range(2)]
    weights = [0.6, 0.9]
    expected = base.clone()
    for model, mask, weight in zip(models, masks, weights, strict=True):
        expected += weight * torch.where(mask, model - base, 0.0) / 0.3
    torch.testing.assert_close(dare(base, models, weights, kept=masks, density=0.3), expected)


def test_dare_ties_elects_among_what_was_kept():
    base, *models = draws(4)
    masks = [random_mask((2, i), 0, 1000, 0.4) for i in range(3)]
    dropped = [base + torch.where(mask, model - base, 0.0) / 0.4 for model, mask in zip(models, masks, strict=True)]
    expected = reference_ties(base, dropped, [0.2, 0.3, 0.5], 1.0, 0.8)
    found = dare_ties(base, models, [0.2, 0.3, 0.5], kept=masks, density=0.4, scale=0.8)
    torch.testing.assert_close(found, expected)


def test_a_random_mask_is_a_function_of_the_place():
    whole = random_mask((3, 4), 0, 4000, 0.25)
    assert torch.cat([random_mask((3, 4), at, 800, 0.25) for at in range(0, 4000, 800)]).equal(whole)
    assert abs(whole.double().mean().item() - 0.25) < 0.03
    assert not random_mask((3, 5), 0, 4000, 0.25).equal(whole)
    assert random_mask((3, 4), 0, 10, 1.0).all()


def test_dare_keeps_the_mean():
    base, model = draws(2, num_elements=200_000)
    found = dare(base, [model], [1.0], kept=[random_mask((0, 0), 0, 200_000, 0.1)], density=0.1)
    assert abs((found - model).mean().item()) < 0.03


def test_slerps_ends_are_the_models_and_its_middle_has_their_norm():
    one, other = (model / model.norm() for model in draws(2))
    assert slerp([one, other], [1.0, 0.0]).equal(one)
    assert slerp([one, other], [0.0, 1.0]).equal(other)
    middle = slerp([one, other], [0.5, 0.5])
    assert middle.norm().item() == pytest.approx(1)
    assert (middle @ one).item() == pytest.approx((middle @ other).item())


def test_slerp_of_parallel_models_is_the_straight_line():
    (one,) = draws(1)
    torch.testing.assert_close(slerp([one, 3 * one], [0.5, 0.5]), 2 * one)
    zeros = torch.zeros(5)
    assert slerp([zeros, zeros], [0.5, 0.5]).equal(zeros)


def test_model_stock_is_the_papers_for_two_and_more():
    base, *models = draws(4)
    models = [base + 0.7 * models[0] + 0.3 * model for model in models]
    for count in (2, 3):
        differences = [model - base for model in models[:count]]
        cosines = [
            torch.cosine_similarity(differences[i], differences[j], dim=0) for i in range(count) for j in range(i)
        ]
        cosine = sum(cosines) / len(cosines)
        share = count * cosine / (1 + (count - 1) * cosine)
        expected = share * sum(models[:count]) / count + (1 - share) * base
        torch.testing.assert_close(model_stock(base, models[:count]), expected)


def test_task_arithmetic_adds_differences_from_the_base_or_an_origin():
    base, one, other, origin = draws(4)
    torch.testing.assert_close(
        task_arithmetic(base, [one, other], [0.5, -0.2]), base + 0.5 * (one - base) - 0.2 * (other - base)
    )
    torch.testing.assert_close(task_arithmetic(base, [one], [0.5], origin), base + 0.5 * (one - origin))


EQUAL = {
    "weighted_sum": lambda base, models, weights: weighted_sum(models, weights),
    "slerp": lambda base, models, weights: slerp(models[:2], [0.5, 0.5] if len(models) > 1 else [1, 0]),
    "task_arithmetic": task_arithmetic,
    "model_stock": lambda base, models, weights: model_stock(base, models),
    "ties": lambda base, models, weights: ties(base, models, weights, density=1.0),
    "dare": lambda base, models, weights: dare(
        base, models, weights, kept=[torch.ones(len(base), dtype=torch.bool)] * len(models), density=1.0
    ),
    "dare_ties": lambda base, models, weights: dare_ties(
        base, models, weights, kept=[torch.ones(len(base), dtype=torch.bool)] * len(models), density=1.0
    ),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("method", "count"),
    # slerp takes two
    [(method, count) for method in EQUAL for count in (1, 2, 3, 7) if method != "slerp" or count > 1],
)
def test_equal_models_come_out_unchanged_bit_for_bit(method, count, dtype):
    base, model = (tensor.to(dtype) for tensor in draws(2))
    # values of very different size, some far below the base's precision
    model[::3] *= 2.0**-12 if dtype == torch.float16 else 2.0**-40
    sums = torch.float64 if dtype == torch.float32 else torch.float32
    found = EQUAL[method](base.to(sums), [model.to(sums)] * count, [1 / count] * count).to(dtype)
    assert found.equal(model)


def test_the_gram_matrix_is_that_of_scalar_products():
    models = draws(3)
    stacked = torch.stack(models)
    torch.testing.assert_close(gram_matrix(models), stacked @ stacked.T)


def test_the_smallest_that_is_kept():
    magnitudes = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert kept_above(magnitudes, 0.5) == pytest.approx(0.3)
    assert kept_above(magnitudes, 0.01) == pytest.approx(0.4)  # at least one
    assert kept_above(torch.empty(0), 0.5) == 0
