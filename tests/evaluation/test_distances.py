"""FID as the reference has it, on features and on folders; KID that is zero where it should be; the bias of FID."""

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dmm.demo.judge import load_judge
from dmm.errors import UserError
from dmm.evaluation.distances import fid, fid_bias, kid
from dmm.evaluation.extractor_names import check_count, check_quick_count
from dmm.evaluation.extractors import open_extractor


def samples(seed, count=400, dim=16, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) @ torch.linspace(0.5, 2, dim).diag() + shift


def reference_fid(one, other):
    """As Heusel et al. wrote it, with the matrix square root of scipy."""
    means = [sample.mean(0) for sample in (one, other)]
    covariances = [np.cov(sample, rowvar=False) for sample in (one, other)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_fid_is_that_of_the_reference(shift):
    one, other = samples(0), samples(1, shift=shift)
    assert fid(one, other) == pytest.approx(reference_fid(one.double().numpy(), other.double().numpy()), rel=1e-6)
    assert fid(one, one) == pytest.approx(0, abs=1e-8)


class JudgeFeatures(nn.Module):
    """The judge as torchmetrics takes a feature extractor."""

    num_features = 320

    def __init__(self):
        super().__init__()
        self.judge = load_judge()

    @torch.no_grad()
    def forward(self, images):
        return self.judge(images / 127.5 - 1).features


def test_fid_is_the_librarys_on_the_same_two_folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("one", 120), ("other", 140)):
        (tmp_path / name).mkdir()
        for i in range(340):
            pixels = rng.normal(level, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")

    def read(name):
        files = sorted((tmp_path / name).iterdir())
        return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2)

    metric = FrechetInceptionDistance(feature=JudgeFeatures())
    metric.update(read("one"), real=False)
    metric.update(read("other"), real=True)
    judge = open_extractor("judge", torch.device("cpu"))
    found = fid(*(judge(read(name))["features"] for name in ("one", "other")))
    assert found == pytest.approx(metric.compute().item(), rel=1e-3)


def test_the_bias_of_equal_distributions_is_all_of_fid():
    pairs = [(samples(seed), samples(100 + seed)) for seed in range(10)]
    found = np.mean([fid(*pair) for pair in pairs])
    assert np.mean([fid_bias(*pair) for pair in pairs]) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("repeats", [2, 10])
def test_kid_is_unbiased_and_its_standard_error_true(repeats):
    """Also of a few dozen, and where the rows of both sets show the same prompts, in which they differ far more."""
    prompts, count = 3 * samples(7, count=20).repeat(repeats, 1), 20 * repeats
    found = [kid(*(prompts + samples(100 * seed + side, count) for side in (0, 1))) for seed in range(40)]
    values, errors = (np.array([getattr(one, name) for one in found]) for name in ("value", "standard_error"))
    assert abs(values.mean()) < 3 * values.std() / 40**0.5
    assert errors.mean() == pytest.approx(values.std(), rel=0.4)


@pytest.mark.parametrize("count", [64, 400])
def test_kid_sees_a_shift(count):
    found = kid(samples(0, count), samples(1, count, shift=0.3 if count == 400 else 0.8))
    assert found.value > 4 * found.standard_error


def test_too_few_pictures_are_told():
    check_count(321, 320, "judge")
    with pytest.raises(UserError, match="320 pictures of each style are too few for the 320 features of 'judge'"):
        check_count(320, 320, "judge")
    with pytest.raises(UserError, match="needs at least 100"):
        check_count(99, 12, "tiny")
    check_quick_count(20)
    with pytest.raises(UserError, match=r"19 pictures of each style are too few for KID .* at least 20"):
        check_quick_count(19)
