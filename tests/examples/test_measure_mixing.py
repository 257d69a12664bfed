"""What the measure of smooth mixing says of steps that are known."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))
from measure_mixing import evenness


def test_even_steps_have_a_ratio_of_one():
    strip = torch.linspace(0, 5, 11)[:, None, None] * torch.ones(1, 4, 3)
    found = evenness(strip, scale=12**-0.5)
    assert found.ratio == pytest.approx(1)
    assert found.mean == pytest.approx(0.5)  # a root mean square, whatever the number of pixels


def test_one_jump_has_the_number_of_steps_and_its_place():
    strip = torch.zeros(11, 2, dtype=torch.uint8)
    strip[7:] = 200
    found = evenness(strip)
    assert found.ratio == pytest.approx(10)
    assert found.at == pytest.approx(0.65)


def test_a_step_back_counts_as_one_forth():
    found = evenness(torch.tensor([[1.0], [0.0], [1.0]]))
    assert (found.largest, found.mean) == (1, 1)
