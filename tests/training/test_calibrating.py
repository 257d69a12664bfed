"""What is known of a style before training: what bytes come to what error, and that it comes back from its file."""

import pytest
import torch
from conftest import tiny_unet

from dmm.models.teachers import freeze
from dmm.training.calibrating import (
    Sample,
    _enough,
    budget_of_rank,
    calibrate,
    costs_of,
    deal_by_budget,
    deal_by_error,
    read_calibrated,
    write_calibrated,
)


def samples(num=4, side=8):
    generator = torch.Generator().manual_seed(2)
    for _ in range(num):
        text = {"encoder_hidden_states": torch.randn(4, 6, 16, generator=generator)}
        x_t = torch.randn(4, 4, side, side, generator=generator)
        timesteps = torch.randint(0, 1000, (4,), generator=generator)
        yield Sample(x_t, timesteps, text, timesteps, text)


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    return freeze(tiny_unet())


@pytest.fixture(scope="module")
def found(start):
    torch.manual_seed(0)
    teacher, generator = freeze(tiny_unet()), torch.Generator().manual_seed(1)
    for parameter in teacher.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    before = {name: one.clone() for name, one in start.state_dict().items()}
    made = calibrate(teacher, start, samples, seed=0, max_rank=64, own={})
    assert all(torch.equal(one, before[name]) for name, one in start.state_dict().items())
    return made


def test_the_error_falls_with_the_size_until_the_style_is_whole(found):
    sizes, errors = zip(*found.curve, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(errors) == sorted(errors, reverse=True)
    assert errors[0] < 1
    assert errors[-1] < 0.01


def test_what_is_dealt_fits_and_smaller_errors_take_more(start, found):
    costs, budget = costs_of(start), budget_of_rank(start, 2)

    def size(ranks):
        return sum(costs[name] * rank for name, rank in ranks.items())

    (ranks,) = deal_by_budget([found], costs, budget)
    assert 0.9 * budget < size(ranks) <= budget
    assert size(deal_by_error(found, costs, 0.5)) < size(deal_by_error(found, costs, 0.05))


def test_it_comes_back_from_its_file(found, tmp_path):
    write_calibrated(found, tmp_path / "ink.safetensors")
    again = read_calibrated(tmp_path / "ink.safetensors")
    assert again.curve == found.curve
    for name, gains in found.gains.items():
        assert torch.equal(again.gains[name], gains)
        assert torch.equal(again.components[name].up, found.components[name].up)
        assert torch.equal(again.components[name].down, found.components[name].down)
    assert all(torch.equal(again.offsets[name], one) for name, one in found.offsets.items())


def test_of_large_latents_few_samples_are_enough():
    assert len(list(_enough(samples(16)))) == 16
    assert len(list(_enough(samples(16, side=64)))) == 4
