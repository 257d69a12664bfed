"""Distances of pairs."""

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from dmm.evaluation.pairwise import estimate, feature_distances, psnr


def test_psnr_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(0, 256, (3, 3, 8, 8), generator=generator) for _ in range(2))
    expected = [peak_signal_noise_ratio(*(x[i].double() for x in (one, other)), data_range=255.0) for i in range(3)]
    torch.testing.assert_close(psnr(one, other), torch.stack(expected).double(), rtol=1e-6, atol=0)


def test_equal_pictures_have_the_psnr_of_rounding():
    one = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    assert psnr(one, one).tolist() == pytest.approx([58.92, 58.92], abs=0.01)


def test_feature_distance_is_one_of_directions():
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert feature_distances(one, other).tolist() == [0, 2, 4]


def test_estimate():
    found = estimate(torch.tensor([1.0, 3.0]))
    assert (found.value, found.standard_error) == (2, pytest.approx(1))
