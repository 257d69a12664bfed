"""Pictures while a student trains: for every prompt a row by the teachers, and under it one by the student."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch
from PIL import Image

from dmm.data.encoding import decode_latents
from dmm.data.synthesis import Share, Synthesis, synthesize
from dmm.families import text_encoders_of
from dmm.files.bars import PartsBar
from dmm.files.pictures import grid, save_png
from dmm.files.runs import SAMPLES
from dmm.pipeline.sampling import sample
from dmm.recipes.recipe import Recipe
from dmm.training.merge_plan import Plan
from dmm.training.preparing import Terms, free_memory, painters_of

Rows = list[list[Image.Image]]
"""By prompt, a picture in each style."""
NUM_PROMPTS = 4
"""That samples show where the recipe names none."""


@torch.no_grad()
def paint_teachers(
    recipe: Recipe, plan: Plan, terms: Terms, base: Any, prompts: Sequence[str], device: torch.device
) -> Rows:
    """What the teachers paint of the samples' prompts, from the noise that the student will have.

    Kept in the user's cache as what they paint to learn from is, so that a resumed run finds it there.

    Args:
        base: the pipeline whose VAE shows all pictures; it comes back to the CPU.
    Raises: UserError: a teacher overflows, or the cache cannot be written.
    """
    settings = recipe.logging
    asked = Synthesis(prompts, count=len(prompts), steps=settings.sample_steps, guidance_scale=settings.sample_guidance)
    share = Share(prompts, range(len(prompts)))
    skips = {teacher.name: teacher.clip_skip or None for teacher in recipe.teachers}
    cache = platformdirs.user_cache_path("dmm") / "encodings"
    base.vae.to(device)
    columns = []
    painters = painters_of(recipe, plan, terms, device)
    with PartsBar(len(painters) * len(prompts), " images", "teachers' samples", leave=False) as bar:
        for name in plan.styles:
            pipeline = painters[name]()
            rows = synthesize(pipeline, base.vae, share, asked, plan.size, cache, bar.update, clip_skip=skips.get(name))
            del pipeline  # before the next one is opened
            columns.append(decode_latents(base.vae, rows.read(torch.arange(len(prompts)))["latents"]))
    base.vae.to("cpu")
    free_memory(device)
    return [list(row) for row in zip(*columns, strict=True)]


@torch.no_grad()
def show(
    pipeline: Any,
    recipe: Recipe,
    size: int,
    styles: list[str],
    prompts: Sequence[str],
    by_teachers: Rows,
    folder: Path,
    device: torch.device,
    step: int,
) -> None:
    """Paint every prompt in every style as the student now does, into one picture with what the teachers painted.

    Args:
        pipeline: the merged one; its VAE and text encoder come back to the CPU.
        size: pixels a side.
        folder: of the run.
    """
    cells = [(prompt, seed, style) for seed, prompt in enumerate(prompts) for style in styles]
    painted, seeds, in_styles = zip(*cells, strict=True)
    readers = (pipeline.vae, *text_encoders_of(pipeline))
    for module in readers:
        module.to(device)
    # not in float16, in which some VAEs overflow
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
        pictures = list(
            sample(
                pipeline,
                painted,
                seeds,
                styles=in_styles,
                steps=recipe.logging.sample_steps,
                guidance_scale=recipe.logging.sample_guidance,
                width=size,
                height=size,
            )
        )
    by_student = [pictures[start : start + len(styles)] for start in range(0, len(pictures), len(styles))]
    rows = [row for pair in zip(by_teachers, by_student, strict=True) for row in pair]
    labels = [label for prompt in prompts for label in (prompt, f"student, step {step}")]
    picture = grid([one for row in rows for one in row], len(styles), row_labels=labels, column_labels=styles)
    save_png(picture, folder / SAMPLES / f"step-{step:08d}.png", overwrite=True)
    for module in readers:
        module.to("cpu")
    free_memory(device)
