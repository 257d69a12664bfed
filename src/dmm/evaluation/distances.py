"""Distances between two sets of features, by the libraries that everybody uses: FID, its bias, and KID."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmm.evaluation.extractor_names import MIN_BLOCK, MIN_SMALL_BLOCK

NUM_BLOCKS = 10


def fid(one: Tensor, other: Tensor) -> float:
    """Fréchet distance of the Gaussians that fit two sets of features best, by torchmetrics.

    Args:
        one, other: (M, D) and (N, D).
    Source: Heusel et al. 2017; DMM eq. 14.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    # each process computes its own: left alone, torchmetrics adds up what all of them have
    metric = FrechetInceptionDistance(feature=_Given(one.shape[1]), sync_on_compute=False)
    metric.update(one.double(), real=False)
    metric.update(other.double(), real=True)
    return metric.compute().item()


def fid_bias(one: Tensor, other: Tensor) -> float:
    """How much too large :func:`fid` is because the sets are finite.

    FID's bias is c / N to first order, so that half of the samples show it twice: it is the mean FID of two halves of
    the rows less that of the whole.

    Args:
        one, other: (N, D), of one length; row i of both shows the same prompt.
    Source: Chong and Forsyth 2020, who extrapolate to 1 / N = 0.
    """
    halves = [fid(one[rows], other[rows]) for rows in _disordered(len(one)).tensor_split(2)]
    return sum(halves) / 2 - fid(one, other)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    standard_error: float


def kid(one: Tensor, other: Tensor) -> Estimate:
    """Kernel distance of two sets of features: the unbiased squared MMD with torchmetrics' cubic kernel.

    It is the mean over ten disjoint blocks of both sets (fewer where they would have less than 50 samples or, of
    sets of less than 100, less than 10), which are independent, and so tell the mean's standard error. Row i of
    both sets shows the same prompt: such pairs are left out of the cross term, as each row's pair with itself is of
    the others, or the sets would look nearer than they are.

    Args:
        one, other: (N, D), of one length, at least 20.
    Source: Bińkowski et al. 2018; the estimator is that of Gretton et al. 2012, lemma 6, for samples in pairs.
    """
    from torchmetrics.image.kid import poly_kernel

    least = MIN_BLOCK if len(one) >= 2 * MIN_BLOCK else MIN_SMALL_BLOCK
    num_blocks = min(NUM_BLOCKS, len(one) // least)
    assert len(one) == len(other)
    assert num_blocks >= 2
    values = []
    for block in _disordered(len(one)).tensor_split(num_blocks):
        x, y = one[block].double(), other[block].double()
        cross = poly_kernel(x, y)
        differences = poly_kernel(x, x) + poly_kernel(y, y) - cross - cross.T
        values.append((differences.sum() - differences.trace()) / (len(block) * (len(block) - 1)))
    found = torch.stack(values)
    return Estimate(found.mean().item(), (found.std() / num_blocks**0.5).item())


def _disordered(count: int) -> Tensor:
    """The rows in an order of no meaning, for the prompts go round, and may do so in step with any other."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


class _Given(nn.Module):
    """A feature extractor for torchmetrics, of features that are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
