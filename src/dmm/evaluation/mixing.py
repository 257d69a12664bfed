"""Mixes of styles: the student's, beside weighted merging of the same teachers (DMM §4.5, table 3).

Both paint the same prompts from the same noise, so that the difference of their scores is one of pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.data.keys import key_of
from dmm.data.rows import Place, Rows, cached_rows
from dmm.evaluation.held_out import Model
from dmm.evaluation.painting import Painting, paint, share_of
from dmm.evaluation.pairwise import estimate
from dmm.evaluation.preference import Scorer
from dmm.families import components_of
from dmm.models.teachers import naming
from dmm.pipeline.styled import temporary_style

Mix = Mapping[str, float]
Bar = Callable[[str, int], AbstractContextManager[Callable[[float], object]]]

STUDENT, MERGED = "student", "weighted_merge"


def weighted_merge(teachers: Mapping[str, Model], mix: Mix, dtype: torch.dtype) -> Any:
    """A pipeline whose weights are the mix's average of the teachers', all components alike.

    Args:
        teachers: by style; of one prediction type.
        mix: weights by style, which sum to 1.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    for style, weight in mix.items():
        pipeline = teachers[style].open(torch.float32)
        for name in (component.name for component in components_of(pipeline)):
            weights = {key: weight * tensor for key, tensor in getattr(pipeline, name).state_dict().items()}
            before = sums.setdefault(name, {})
            sums[name] = {key: tensor + before.get(key, 0) for key, tensor in weights.items()}
    for name, tensors in sums.items():
        getattr(pipeline, name).load_state_dict(tensors)
    return pipeline.to(dtype)


def mixing_scores(
    student: Model,
    teachers: Mapping[str, Model],
    mixes: Sequence[Mix],
    scorers: Sequence[Scorer],
    prompts: Sequence[str],
    num_images: int,
    painting: Painting,
    seed: int,
    device: torch.device,
    cache: Path,
    place: Place,
    bar: Bar,
    wait: Callable[[], object],
) -> dict[str, Any]:
    """Paint every mix twice, by the student and by weighted merging, and score the pictures.

    Args:
        student: a model with styles.
        bar: makes a progress bar of a title and a length.
        wait: for the other processes.
    Returns: for the report: by mix and scorer, the mean scores of both, and of the student's lead.
    Raises: UserError: there is no such style.
    """
    dtype = painting.dtype(device)
    pictures: dict[tuple[str, str], Rows] = {}
    shares = {write_mix(mix): share_of(prompts, num_images, write_mix(mix), "mix", seed) for mix in mixes}
    mine = place.rows(num_images)
    with bar("mixes", 2 * len(mixes) * mine) as progress:
        pipeline = student.open(dtype)
        for mix in mixes:
            with temporary_style(pipeline, mix), naming("student"):
                pictures[STUDENT, write_mix(mix)] = paint(
                    pipeline, shares[write_mix(mix)], painting, cache, progress, place, clip_skip=student.clip_skip
                )
        for mix in mixes:
            pipeline = weighted_merge(teachers, mix, dtype)
            with naming("weighted merge"):
                pictures[MERGED, write_mix(mix)] = paint(
                    pipeline, shares[write_mix(mix)], painting, cache, progress, place
                )
        del pipeline
    scores: dict[tuple[str, str, str], Rows] = {}
    with bar("scores", len(pictures) * len(scorers) * mine) as progress:
        for (who, named), rows in pictures.items():
            for scorer in scorers:
                scored = _score(scorer, rows, shares[named].prompts, cache, progress, place)
                scores[who, named, scorer.name] = scored
    wait()
    everything = torch.arange(num_images)
    told: dict[str, Any] = {}
    for named in shares:
        told[named] = {}
        for scorer in scorers:
            ours, theirs = (scores[who, named, scorer.name].read(everything)["scores"] for who in (STUDENT, MERGED))
            told[named][scorer.name] = {
                STUDENT: asdict(estimate(ours)),
                MERGED: asdict(estimate(theirs)),
                "difference": asdict(estimate(ours - theirs)),
            }
    return told


def write_mix(mix: Mix) -> str:
    """A mix as people write it: ``ink=0.7,photo=0.3``."""
    return ",".join(f"{style}={weight:g}" for style, weight in mix.items())


def _score(
    scorer: Scorer,
    images: Rows,
    prompts: Sequence[str],
    cache: Path,
    progress: Callable[[float], object],
    place: Place,
) -> Rows:
    painted = iter(images.shards)

    def key(rows: range) -> str:
        asked = list(prompts[rows.start : rows.stop])
        return key_of(scorer=scorer.identity, name=scorer.name, prompts=asked, pictures=next(painted).path.stem)

    def make(rows: range) -> dict[str, Tensor]:
        pixels = images.read(torch.arange(rows.start, rows.stop))["images"].to(torch.uint8)
        scores = scorer(pixels, prompts[rows.start : rows.stop])
        progress(len(rows))
        return {"scores": scores}

    return cached_rows(cache / "scores", len(images), key, make, progress, place)
