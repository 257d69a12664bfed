"""The figures of a report, from what was seen of the pictures and from their distances."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmm.data.rows import Rows
from dmm.evaluation import judged
from dmm.evaluation.distances import Estimate, fid, fid_bias, kid
from dmm.evaluation.extractors import Extractor, JudgeExtractor
from dmm.evaluation.pairwise import estimate, feature_distances, psnr
from dmm.evaluation.score_error import ScoreError

STUDENT, REFERENCE, SECOND = "student", "reference", "second"
"""Who painted: the student and, in two batches, the teacher; the student from the second one's noise."""

Job = tuple[Any, ...]
"""Names a distance: its kind, who painted, in which style and, of FID, beside which teacher's."""


def distances_between(
    styles: Sequence[str], features: Mapping[tuple[str, str], Tensor], *, with_fid: bool
) -> dict[Job, Callable[[], float | Estimate]]:
    """All distances that there are to compute."""
    jobs: dict[Job, Callable[[], float | Estimate]] = {}
    for who in (STUDENT, SECOND):
        for style in styles:
            jobs["kid", who, style] = partial(kid, features[who, style], features[REFERENCE, style])
    for who in (STUDENT, SECOND) if with_fid else ():
        for row in styles:
            for column in styles:
                sets = features[who, row], features[REFERENCE, column]
                jobs["fid", who, row, column] = partial(fid, *sets)
                if row == column:
                    jobs["bias", who, row] = partial(fid_bias, *sets)
    return jobs


NO_FID: Mapping[str, None] = dict.fromkeys(
    ("fid_matrix", "fid_reference", "fidt", "fidt_reference", "fidt_gap_percent", "fid_bias")
)
"""What :func:`fid_figures` finds, of too few pictures for it."""


def fid_figures(styles: Sequence[str], distances: Mapping[Job, Any]) -> dict[str, Any]:
    """The matrix of FID between all styles, its trace, and the teachers' own (DMM §4.1)."""
    matrices = {
        who: [[distances["fid", who, row, column] for column in styles] for row in styles] for who in (STUDENT, SECOND)
    }
    traces = {who: sum(matrix[i][i] for i in range(len(styles))) for who, matrix in matrices.items()}
    biases = {who: sum(distances["bias", who, style] for style in styles) for who in matrices}
    return {
        "fid_matrix": matrices[STUDENT],
        "fid_reference": matrices[SECOND],
        "fidt": traces[STUDENT],
        "fidt_reference": traces[SECOND],
        "fidt_gap_percent": 100 * (traces[STUDENT] / traces[SECOND] - 1),
        "fid_bias": {"fidt": biases[STUDENT], "fidt_reference": biases[SECOND]},
    }


def kid_figures(styles: Sequence[str], distances: Mapping[Job, Any]) -> dict[str, Any]:
    """KID of every style and their mean, the student's and the teachers' own."""
    names = {"student": STUDENT, SECOND: "reference"}
    return {
        name: {
            "mean": asdict(_mean([distances["kid", who, style] for style in styles])),
            "by_style": {style: asdict(distances["kid", who, style]) for style in styles},
        }
        for who, name in names.items()
    }


def error_figures(errors: ScoreError) -> dict[str, Any]:
    """The score error over all timesteps and by band, of every style and of all."""
    return {
        "mean": errors.mean,
        "by_style": errors.by_style,
        "bands": [[band.start, band.stop] for band in errors.bands],
        "curve": errors.curve,
        "by_band": errors.by_band,
    }


def pairwise_figures(
    styles: Sequence[str], features: Mapping[tuple[str, str], Tensor], pictures: Mapping[tuple[str, str], Rows]
) -> dict[str, Any]:
    """How far student and teacher are apart, picture by picture from the same noise, and a teacher from other noise."""
    measured: dict[str, dict[str, Estimate]] = {
        "feature_distance": {
            style: estimate(feature_distances(features[STUDENT, style], features[SECOND, style])) for style in styles
        },
        # the yardstick: the same teacher and the same prompt, but other noise
        "feature_distance_of_other_noise": {
            style: estimate(feature_distances(features[REFERENCE, style], features[SECOND, style])) for style in styles
        },
        "psnr": {style: estimate(_psnr(pictures[STUDENT, style], pictures[SECOND, style])) for style in styles},
        "psnr_of_other_noise": {
            style: estimate(_psnr(pictures[REFERENCE, style], pictures[SECOND, style])) for style in styles
        },
    }
    return {
        name: {
            "mean": asdict(_mean(list(by_style.values()))),
            "by_style": {style: asdict(one) for style, one in by_style.items()},
        }
        for name, by_style in measured.items()
    }


def _psnr(one: Rows, other: Rows) -> Tensor:
    batches = torch.arange(len(one)).split(64)
    return torch.cat([psnr(one.read(batch)["images"], other.read(batch)["images"]) for batch in batches])


def judged_figures(
    styles: Sequence[str],
    extractor: Extractor,
    found: Mapping[tuple[str, str], Mapping[str, Tensor]],
    prompts: Sequence[str],
    num_images: int,
) -> dict[str, Any] | None:
    """What the judge says of the pictures, of the styles that it knows, if it is asked for things that it knows."""
    if not isinstance(extractor, JudgeExtractor):
        return None
    styles = [style for style in styles if style in extractor.styles]
    if not styles or not set(prompts) <= set(extractor.concepts):
        return None
    painted = [prompts[i % len(prompts)] for i in range(num_images)]
    verdicts = {
        who: {
            style: judged.judge_pictures(found[who, style], style, painted, extractor.styles, extractor.concepts)
            for style in styles
        }
        for who in (STUDENT, SECOND)
    }
    rights: dict[str, Callable[[judged.Verdicts], Tensor]] = {
        "style": lambda one: one.right_style,
        "concept": lambda one: one.right_concept,
        "both": lambda one: one.right_style & one.right_concept,
    }
    compared = {}
    for what, right in rights.items():
        student, teacher = ({style: right(one) for style, one in verdicts[who].items()} for who in (STUDENT, SECOND))
        compared[what] = asdict(judged.compare(student, teacher))
    return compared


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Of independent estimates."""
    count = len(estimates)
    return Estimate(
        sum(one.value for one in estimates) / count, sum(one.standard_error**2 for one in estimates) ** 0.5 / count
    )
