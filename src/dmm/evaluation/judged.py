"""What the judge of the embedded experts says: how often a picture is in the right style and of the right thing.

Student and teacher paint the same prompts from the same noise, so that their difference is one of pairs: its
interval comes from a bootstrap that draws pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Verdicts:
    """Of N pictures that were to be in one style."""

    right_style: Tensor
    """(N,) bool."""
    right_concept: Tensor
    """(N,) bool."""


@dataclass(frozen=True)
class Comparison:
    """How often the student is right beside its teachers; rates and differences in per cent.

    Attributes:
        student, teacher: by style.
        difference: student less teacher, by style.
        mean_difference: over styles.
        interval: of the mean difference, 95 %.
        worst: the smallest difference of any style.
    """

    student: dict[str, float]
    teacher: dict[str, float]
    difference: dict[str, float]
    mean_difference: float
    interval: tuple[float, float]
    worst: float


def judge_pictures(
    found: Mapping[str, Tensor], style: str, prompts: Sequence[str], styles: Sequence[str], concepts: Sequence[str]
) -> Verdicts:
    """Whether pictures are what was asked for.

    Args:
        found: of the judge as an extractor: ``style`` and ``concept``, logits.
        style: one of ``styles``.
        prompts: N, each one of ``concepts``.
        styles, concepts: the judge's, in the order of its heads.
    """
    asked = torch.tensor([list(concepts).index(prompt) for prompt in prompts])
    is_style = found["style"].argmax(1) == list(styles).index(style)
    return Verdicts(is_style, found["concept"].argmax(1) == asked)


def compare(students: Mapping[str, Tensor], teachers: Mapping[str, Tensor], seed: int = 0) -> Comparison:
    """Compare who is right how often, pair by pair.

    Args:
        students, teachers: by style, (N,) bool; row i of both is of the same prompt and noise.
        seed: of the bootstrap's 10,000 resamples, each of N pairs in every style.
    """
    rng = np.random.default_rng(seed)
    student = {style: 100 * right.double().mean().item() for style, right in students.items()}
    teacher = {style: 100 * teachers[style].double().mean().item() for style in students}
    difference = {style: student[style] - teacher[style] for style in students}
    resampled = np.zeros(NUM_RESAMPLES)
    for style, right in students.items():
        gains = (right.int() - teachers[style].int()).numpy()
        counts = np.array([(gains == gain).sum() for gain in (-1, 0, 1)])
        # to draw N pairs is to draw how many are lost, alike and won
        drawn = rng.multinomial(len(gains), counts / len(gains), size=NUM_RESAMPLES)
        resampled += 100 * (drawn[:, 2] - drawn[:, 0]) / len(gains) / len(students)
    low, high = np.quantile(resampled, [0.025, 0.975])
    mean = sum(difference.values()) / len(difference)
    return Comparison(student, teacher, difference, mean, (float(low), float(high)), min(difference.values()))
