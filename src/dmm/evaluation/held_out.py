"""The score error of a merge: what the teachers paint from seeds that no training has used, and the error on it.

It is measured on what all teachers have painted, for every style: wherever a picture begins, its style has to lead it
home. Measured on what a style's own teacher has painted alone, the error is relative to a base that mostly sees there
whose hand it is, and says how much of the last details is missing.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.data import Synthesis, TrainingData, prepare_data
from dmm.data.keys import digest_denoiser, digest_tensors, digest_text_encoders, digest_vae, key_of, public_config
from dmm.data.rows import cached_rows
from dmm.data.training import reader_in
from dmm.evaluation.painting import Painting
from dmm.evaluation.score_error import References, ScoreError, score_error
from dmm.families import denoiser_of
from dmm.models.teachers import naming
from dmm.models.text_adapters import reading_as
from dmm.pipeline.reading import reads_otherwise
from dmm.pipeline.styled import style_prompts_of, temporary_style
from dmm.training.batches import CaptionedLatents

NUM_LATENTS = 64
"""Of each style."""
NUM_QUICK_LATENTS = 16
"""Of each style, where the whole is to be quick."""
NUM_BANDS = 10
"""Of timesteps."""
DRAWS_PER_LATENT = 16
"""Of noise and timesteps: as many for each style, whosever latents they are of, as it has latents times these."""


@dataclass(frozen=True)
class Model:
    """A model that takes part in an evaluation."""

    open: Callable[[torch.dtype], Any]
    """Opens its pipeline, in that dtype and on the device that it shall run on."""
    source: str = ""
    """Where it is, for the report."""
    sha256: str = ""
    """Of its weights."""
    clip_skip: int | None = None
    """Layers of its text encoder that are left out."""


@dataclass(frozen=True)
class HeldOut:
    """Latents that every teacher has synthesised, for the same prompts from the same noise.

    Attributes:
        by_teacher: what each teacher has painted, which its own text encoder and the student's read.
        settings: that it was painted by, for the caches of what is found on it.
    """

    by_teacher: Mapping[str, TrainingData]
    settings: Mapping[str, Any]


class Everywhere:
    """All teachers' latents as one teacher and the student read their captions; those of a teacher are neighbours."""

    def __init__(self, held_out: HeldOut, style: str) -> None:
        self._painted = list(held_out.by_teacher.values())
        self._read = held_out.by_teacher[style]
        self._count = self._read.num_rows
        self.num_rows = self._count * len(self._painted)
        self.latent_shape = self._read.latent_shape

    def latents(self, rows: Tensor) -> Tensor:
        """(B, C, h, w) float32, on the CPU."""
        return torch.cat([self._painted[row // self._count].latents(row[None] % self._count) for row in rows])

    def conditioning(self, encoder: str, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """What a denoiser reads of the captions, which are every teacher's."""
        return self._read.conditioning(encoder, rows % self._count, dropped)


def synthesize_held_out(
    teachers: Mapping[str, Model],
    student: Model,
    prompts: Sequence[str],
    painting: Painting,
    size: int,
    cache: Path,
    seed: int,
    progress: Callable[[float], object],
    *,
    num_latents: int = NUM_LATENTS,
) -> HeldOut:
    """Let every teacher paint latents that no training has seen, in float32, as far as the cache does not hold them.

    Args:
        size: pixels a side of the pictures whose latents they are.
        cache: folder of the cache.
        seed: of the evaluation, from which the latents' is made.
        progress: called with 1 for every teacher.
        num_latents: by each teacher.
    Raises: UserError: the size does not suit a model.
    """
    # one that nobody has reason to give a training
    digest = hashlib.sha256(f"held out {seed}".encode()).digest()
    synthesis = Synthesis(
        prompts,
        num_latents,
        steps=painting.steps,
        guidance_scale=painting.guidance_scale,
        negative_prompt=painting.negative_prompt,
        sampler=painting.sampler,
        seed=int.from_bytes(digest[:7], "big"),
    )
    merged = student.open(torch.float32)
    made = {}
    for style, teacher in teachers.items():
        readers = {}
        if reads_otherwise(style_prompts_of(merged), style):
            readers[reader_in(style)] = partial(reading_as, merged, style_prompts_of(merged).adapters[style])
        of_student = dict.fromkeys(("student", *readers), student.clip_skip)
        skips = {name: skip for name, skip in (of_student | {style: teacher.clip_skip}).items() if skip}
        with naming(f"teacher '{style}'"):
            made[style] = prepare_data(
                synthesis,
                merged,
                {style: partial(teacher.open, torch.float32)},
                size=size,
                cache=cache,
                clip_skips=skips,
                readers=readers,
                show_progress=False,
            )
        progress(1)
    return HeldOut(made, {"synthesis": asdict(synthesis), "size": size, "seed": seed, "skip": student.clip_skip})


def held_out_error(
    student: Model, style: str, teacher: Model, base: Model, held_out: HeldOut, cache: Path, *, own: bool
) -> ScoreError:
    """Measure one style of a student on held-out latents, in float32.

    Args:
        student: a model with styles.
        style: which is measured.
        teacher: of that style.
        cache: folder of the cache, which keeps what was found.
        own: on what the style's own teacher has painted, not on what all have.
    """
    data: CaptionedLatents = held_out.by_teacher[style] if own else Everywhere(held_out, style)
    everything = torch.arange(data.num_rows)
    pipelines = {name: model.open(torch.float32) for name, model in (("student", student), (style, teacher))}
    base_pipeline = base.open(torch.float32)
    prompts = style_prompts_of(pipelines["student"])
    readers = {style: reader_in(style)} if reads_otherwise(prompts, style) else {}
    with temporary_style(pipelines["student"], style):
        made_by = {name: _digests(pipeline) for name, pipeline in pipelines.items()} | {"base": _digests(base_pipeline)}
    latents = digest_tensors({"latents": data.latents(everything)})
    made_on = {"latents": latents, "teacher_skip": teacher.clip_skip, **held_out.settings}

    def keep(_: str, count: int, say: References) -> References:
        # the base reads captions as the student's text encoder does without a style
        read_by, said_by = digest_text_encoders(pipelines["student"]), [made_by[style], made_by["base"]]
        references = partial(key_of, kind="references", models=said_by, student_reads=read_by, **made_on)
        rows = cached_rows(
            cache / "references", count, lambda span: references(span=[span.start, span.stop]), say, lambda _: None
        )
        return lambda span: rows.read(torch.tensor(span))

    def measure(_rows: range) -> dict[str, Tensor]:
        found = score_error(
            pipelines["student"],
            {style: pipelines[style]},
            base_pipeline,
            data,
            {style: everything},
            draws_per_row=DRAWS_PER_LATENT * held_out.by_teacher[style].num_rows // len(everything) or 1,
            num_bands=NUM_BANDS,
            seed=held_out.settings["seed"],
            keep=keep,
            readers=readers,
        )
        edges = [[band.start, band.stop] for band in found.bands]
        by_band = torch.tensor(found.by_band[style], dtype=torch.float64)
        return {
            "error": torch.tensor([found.by_style[style]], dtype=torch.float64),
            "by_band": by_band[None],
            "edges": torch.tensor([edges]),
        }

    key = key_of(models=list(made_by.values()), num_bands=NUM_BANDS, **made_on)
    found = cached_rows(cache / "errors", 1, lambda _: key, measure, lambda _: None).read(torch.tensor([0]))
    bands = [range(int(start), int(stop)) for start, stop in found["edges"][0].tolist()]
    return ScoreError({style: found["error"].item()}, {style: found["by_band"][0].tolist()}, bands)


def join(errors: Sequence[ScoreError]) -> ScoreError:
    """Score errors of different styles as one."""
    by_style = {style: error for one in errors for style, error in one.by_style.items()}
    by_band = {style: error for one in errors for style, error in one.by_band.items()}
    return ScoreError(by_style, by_band, errors[0].bands)


def _digests(pipeline: Any) -> dict[str, Any]:
    return {
        "unet": digest_denoiser(denoiser_of(pipeline)),
        "text_encoders": digest_text_encoders(pipeline),
        "vae": digest_vae(pipeline.vae),
        "scheduler": public_config(pipeline.scheduler),
    }
