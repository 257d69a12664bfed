"""An evaluation from its models to its figures: paint, look, compare.

Every style is painted three times: by its teacher twice, from two independent batches of noise, and by the student
from the noise of the second batch. The student's and the teachers' second pictures are compared with the first:
``M(i, j) = FID(student i, teacher j)``, and the reference, ``FID(teacher i, teacher j)`` (DMM §4.1). Student and
teacher of one style begin from the same noise, so that they can be compared picture by picture too.
"""

import gc
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

import dmm
from dmm.data.rows import Place, Rows
from dmm.errors import UserError, nearest
from dmm.evaluation.extractor_names import check_count, check_quick_count
from dmm.evaluation.extractors import FEATURES, Extractor, extract
from dmm.evaluation.figures import (
    NO_FID,
    REFERENCE,
    SECOND,
    STUDENT,
    Job,
    distances_between,
    error_figures,
    fid_figures,
    judged_figures,
    kid_figures,
    pairwise_figures,
)
from dmm.evaluation.held_out import (
    NUM_LATENTS,
    NUM_QUICK_LATENTS,
    HeldOut,
    Model,
    held_out_error,
    join,
    synthesize_held_out,
)
from dmm.evaluation.mixing import Mix, mixing_scores
from dmm.evaluation.painting import Painting, paint, share_of
from dmm.evaluation.preference import Scorer
from dmm.evaluation.score_error import ScoreError
from dmm.families import denoiser_of
from dmm.files.bars import PartsBar
from dmm.files.outputs import check_disk, held_bytes
from dmm.models.styles import style_weights, styled_port
from dmm.models.teachers import naming
from dmm.pipeline.sampling import picture_size
from dmm.pipeline.styled import style_names, temporary_style
from dmm.training.processes import on_main

GRID_PROMPTS = 4

Pictures = dict[tuple[str, str], Rows]
"""By who painted which batch, and style."""

_PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "numpy")


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how."""

    prompts: Sequence[str]
    """What of; they go round until there are enough pictures."""
    num_images: int = 5000
    """Of each style and batch; the paper's number."""
    painting: Painting = field(default_factory=Painting)
    """How they are painted."""
    seed: int = 0
    """Of all noise."""
    with_fid: bool = True
    """Whether FID is measured, for which pictures must be more than features; all else needs 20 of each style."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation has found.

    Attributes:
        figures: what ``report.json`` holds.
        prompts: of the pictures that a reader is shown.
        teachers, students: by style, their pictures of these prompts, (3, H, W), 8 bits.
    """

    figures: dict[str, Any]
    prompts: list[str]
    teachers: dict[str, list[Tensor]]
    students: dict[str, list[Tensor]]


def evaluate(
    student: Model,
    teachers: Mapping[str, Model],
    extractor: Extractor,
    protocol: Protocol,
    cache: Path,
    *,
    base: Model | None = None,
    mixes: Sequence[Mix] = (),
    scorers: Sequence[Scorer] = (),
    show_progress: bool = True,
) -> Evaluation:
    """Measure how well a student paints as its teachers do.

    Called in every process of a run; they share the work. An evaluation that was interrupted goes on where it was, by
    what the cache holds.

    Args:
        student: a merged model; a stock one paints the same in every style.
        teachers: by style.
        cache: folder of the cache: pictures, features and latents, by what they were made from.
        base: what the score error is measured beside; without, or with a stock student, there is none.
        mixes: of styles, painted by the student and by weighted merging.
        scorers: of the mixes' pictures.
        show_progress: bars on stderr.
    Raises: UserError: no such style, too few pictures for the extractor, no room for them in the cache, or something
        is wrong with a model.
    """
    start = time.monotonic()
    state = PartialState()
    place = Place(state.process_index, state.num_processes)
    bar = partial(_bar, shown=show_progress and state.is_main_process)
    styles, painting = list(teachers), protocol.painting
    pipeline = student.open(painting.dtype(state.device))
    has_styles = styled_port(denoiser_of(pipeline)) is not None
    width, height = _check(pipeline, styles, extractor, protocol, mixes, cache)

    mine = place.rows(protocol.num_images)
    with bar("pictures", 3 * len(styles) * mine) as progress:
        paint_batch = partial(_paint_batch, protocol, cache, place, progress)
        pictures: Pictures = {}
        for style in styles:
            with temporary_style(pipeline, style) if has_styles else nullcontext(), naming("student"):
                pictures[STUDENT, style] = paint_batch(pipeline, student, style, SECOND)
        del pipeline  # before the next one is opened
        for style, teacher in teachers.items():
            pictures |= _paint_teacher(style, teacher, painting.dtype(state.device), paint_batch)
    with bar("features", len(pictures) * mine) as progress:
        seen_by = {who: extract(extractor, rows, cache, progress, place) for who, rows in pictures.items()}
    state.wait_for_everyone()
    everything = torch.arange(protocol.num_images)
    found = {who: rows.read(everything) for who, rows in seen_by.items()}
    features = {who: one[FEATURES] for who, one in found.items()}

    distances = _share_out(distances_between(styles, features, with_fid=protocol.with_fid), place, bar)
    errors = None
    if base is not None and has_styles:
        errors = _score_error(student, teachers, base, protocol, width, cache, place, bar)

    mixed = None
    if mixes:
        mixed = mixing_scores(
            student,
            teachers,
            mixes,
            scorers,
            protocol.prompts,
            protocol.num_images,
            painting,
            protocol.seed,
            state.device,
            cache,
            place,
            bar,
            state.wait_for_everyone,
        )

    figures = {
        "styles": styles,
        "num_images": protocol.num_images,
        "extractor": extractor.name,
        **(fid_figures(styles, distances) if protocol.with_fid else NO_FID),
        "kid": kid_figures(styles, distances),
        "score_error": errors and {**error_figures(errors[0]), "own": error_figures(errors[1])},
        "pairwise": pairwise_figures(styles, features, pictures),
        "judged": judged_figures(styles, extractor, found, protocol.prompts, protocol.num_images),
        "mixing": mixed,
        "settings": _settings(protocol, width, height, state),
        "sources": {
            "student": _source(student),
            "base": base and _source(base),
            "teachers": {style: _source(teacher) for style, teacher in teachers.items()},
            "extractor": extractor.identity,
        },
        "versions": {"dmm": dmm.__version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
        "seconds": round(time.monotonic() - start, 1),
    }
    shown = torch.arange(min(GRID_PROMPTS, protocol.num_images, len(protocol.prompts)))

    def show(who: str) -> dict[str, list[Tensor]]:
        return {style: list(pictures[who, style].read(shown)["images"].to(torch.uint8)) for style in styles}

    return Evaluation(figures, list(protocol.prompts[: len(shown)]), show(SECOND), show(STUDENT))


@contextmanager
def _bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[float], object]]:
    with PartsBar(total, "", title, disable=not shown) as progress:
        yield progress.update


def _check(
    pipeline: Any,
    styles: Sequence[str],
    extractor: Extractor,
    protocol: Protocol,
    mixes: Sequence[Mix],
    cache: Path,
) -> tuple[int, int]:
    """Refuse what cannot be measured of a student, before anything is painted.

    Returns: the pictures' width and height.
    """
    has_styles = styled_port(denoiser_of(pipeline)) is not None
    known = style_names(pipeline) if has_styles else styles
    for style in styles:
        if style not in known:
            raise UserError(
                f"The student has no style '{style}'{nearest(style, known)}; its styles are {', '.join(known)}. "
                "A teacher is named after the style that it is the measure of."
            )
    for mix in mixes:
        if not has_styles:
            raise UserError("Only a merged model paints mixes of styles; this student is a stock one.")
        style_weights(styles, mix)  # each style of a mix needs its teacher
    width, height = picture_size(pipeline, protocol.painting.width, protocol.painting.height)
    seen = extractor(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    if protocol.with_fid:
        check_count(protocol.num_images, seen[FEATURES].shape[1], extractor.name)
    else:
        check_quick_count(protocol.num_images)
    needed = 3 * len(styles) * protocol.num_images * 3 * width * height
    on_main(lambda: _check_cache(cache, needed))
    return width, height


def _check_cache(cache: Path, num_bytes: int) -> None:
    # some of what it holds may be of these pictures already
    missing = num_bytes - held_bytes(cache)
    check_disk(cache, missing, "the pictures", "ask for fewer or smaller ones, or name another cache")


def _paint_teacher(style: str, teacher: Model, dtype: torch.dtype, paint_batch: Callable[..., Rows]) -> Pictures:
    """Its two batches."""
    _free()  # what held another one
    pipeline = teacher.open(dtype)
    with naming(f"teacher '{style}'"):
        return {(batch, style): paint_batch(pipeline, teacher, style, batch) for batch in (REFERENCE, SECOND)}


def _paint_batch(
    protocol: Protocol,
    cache: Path,
    place: Place,
    progress: Callable[[float], object],
    pipeline: Any,
    model: Model,
    style: str,
    batch: str,
) -> Rows:
    """The pictures of one style that begin from one batch's noise."""
    share = share_of(protocol.prompts, protocol.num_images, style, batch, protocol.seed)
    return paint(pipeline, share, protocol.painting, cache, progress, place, clip_skip=model.clip_skip)


def _share_out(jobs: Mapping[Job, Callable[[], Any]], place: Place, bar: Callable[..., Any]) -> dict[Job, Any]:
    names = list(jobs)[place.index :: place.count]
    with bar("distances", len(names)) as progress:
        made = []
        for name in names:
            made.append((name, jobs[name]()))
            progress(1)
    return dict(gather_object(made))


def _score_error(
    student: Model,
    teachers: Mapping[str, Model],
    base: Model,
    protocol: Protocol,
    size: int,
    cache: Path,
    place: Place,
    bar: Callable[..., Any],
) -> tuple[ScoreError, ScoreError]:
    """On all teachers' latents, and on each style's own teacher's."""
    mine = list(teachers)[place.index :: place.count]

    def synthesize(styles: Sequence[str], progress: Callable[[float], object]) -> HeldOut:
        painters = {style: teachers[style] for style in styles}
        arguments = (student, protocol.prompts, protocol.painting, size, cache, protocol.seed, progress)
        num_latents = NUM_LATENTS if protocol.with_fid else NUM_QUICK_LATENTS
        return synthesize_held_out(painters, *arguments, num_latents=num_latents)

    made = []
    with bar("errors", 3 * len(mine)) as progress:
        synthesize(mine, progress)
        PartialState().wait_for_everyone()
        held_out = synthesize(list(teachers), lambda _: None)  # the others' share, too
        for style in mine:
            for own in (False, True):
                with naming(f"teacher '{style}'"):
                    error = held_out_error(student, style, teachers[style], base, held_out, cache, own=own)
                made.append((own, error))
                progress(1)
    found = {(own, style): error for own, error in gather_object(made) for style in error.by_style}
    everywhere, on_own = (join([found[own, style] for style in teachers]) for own in (False, True))
    return everywhere, on_own


def _settings(protocol: Protocol, width: int, height: int, state: PartialState) -> dict[str, Any]:
    device = state.device
    return {
        **asdict(protocol.painting),
        "width": width,
        "height": height,
        "seed": protocol.seed,
        "num_prompts": len(protocol.prompts),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_processes": state.num_processes,
    }


def _source(model: Model) -> dict[str, str]:
    return {"source": model.source, "sha256": model.sha256}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
