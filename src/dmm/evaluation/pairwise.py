"""Fidelity of details: the student's picture beside the teacher's, of the same prompt and the same starting noise."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dmm.evaluation.distances import Estimate

_QUANTISATION = 1 / 12 / 255**2  # mean square of what rounding to 8 bits takes off


@dataclass(frozen=True)
class Pairwise:
    """How far pictures are from their counterparts, means over pairs.

    Attributes:
        feature_distance: squared distance of the features' directions, 0 for equal ones and at most 4.
        psnr: peak signal-to-noise ratio in dB; 58.9 for equal pictures, where nothing but 8 bits' rounding is left.
    """

    feature_distance: Estimate
    psnr: Estimate


def feature_distances(one: Tensor, other: Tensor) -> Tensor:
    """Of each row of features from its counterpart, as LPIPS has it of a layer: of unit vectors, squared.

    Args:
        one, other: (N, D).
    Returns: (N,).
    Source: Zhang et al. 2018, eq. 1.
    """
    return (F.normalize(one.double(), dim=1) - F.normalize(other.double(), dim=1)).square().sum(1)


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture to its counterpart, in dB, at most that of 8 bits, 58.9.

    Args:
        one, other: (N, C, H, W), from 0 to 255.
    Returns: (N,).
    """
    errors = ((one.double() - other.double()) / 255).square().flatten(1).mean(1)
    return -10 * errors.clamp(min=_QUANTISATION).log10()


def estimate(values: Tensor) -> Estimate:
    """Mean of N independent values, N > 1, and its standard error."""
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item())
