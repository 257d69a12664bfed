"""A merge that is under way as a model: what its newest checkpoints hold, with the styles that it has by then."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmm.errors import UserError
from dmm.families import denoiser_of
from dmm.files.runs import CHECKPOINTS, RECIPE, UNTRAINED, Run, find_run
from dmm.models.side_car import read_side_car
from dmm.models.styles import StylePrompts
from dmm.models.teachers import ModelSource, locate, open_pipeline
from dmm.pipeline.styled import add_styles
from dmm.recipes.recipe import Recipe, load_recipe
from dmm.training.adapting import adapters_at, stored, style_folder
from dmm.training.checkpoint import load_checkpoint, newest_checkpoint
from dmm.training.sources import base_of
from dmm.training.trainer import STUDENT


@dataclass(frozen=True)
class Preview:
    """What a run has to show.

    Attributes:
        checkpoint: the newest that is whole; where styles are adapters and none is trained yet, what was calibrated.
        styles: the student's.
        calibrated: where styles are adapters, the pipeline whose adapters the checkpoints hold later states of.
        trained: those checkpoints, each with its styles.
    """

    recipe: Recipe
    checkpoint: Path
    styles: list[str]
    calibrated: Path | None = None
    trained: Sequence[tuple[Path, Sequence[str]]] = ()


def find_preview(folder: Path) -> Preview:
    """What there is to paint with in the folder of a merge, finished or not.

    Raises: UserError: it is no merge, none of its checkpoints is whole, or its base is gone.
    """
    run = find_run(folder)
    if run is None:
        raise UserError(f"{folder} is not the folder of a merge: it has no {RECIPE} beside {CHECKPOINTS}/.")
    if run.is_acceleration:
        raise UserError(f"{folder} holds {run.title}, whose checkpoints are not painted with. Paint with its result.")
    recipe = load_recipe(run.folder / RECIPE)
    earlier = read_side_car(locate(base_of(recipe))) if recipe.earlier else None
    names = [*(earlier.names if earlier else []), *(teacher.name for teacher in recipe.teachers)]
    if recipe.styles.has_adapters:
        return _of_adapters(folder, run, recipe, names)
    newest = newest_checkpoint(run.folder / CHECKPOINTS)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint to paint with yet; its recipe saves one every {_every(recipe)}.")
    return Preview(recipe, newest, names)


def _of_adapters(folder: Path, run: Run, recipe: Recipe, names: list[str]) -> Preview:
    calibrated = run.folder / UNTRAINED if run.is_calibrated else run.folder
    if not run.is_calibrated and not run.is_finished:
        raise UserError(f"{folder} has nothing to paint with yet: its styles are being calibrated.")
    new = [teacher.name for teacher in recipe.teachers]
    roots = {run.folder / CHECKPOINTS: new}
    if recipe.styles.trained == "adapters":
        roots = {style_folder(run.folder, recipe, name) / CHECKPOINTS: [name] for name in new}
    found = [(newest, styles) for root, styles in roots.items() if (newest := newest_checkpoint(root)) is not None]
    latest = max((path for path, _ in found), key=lambda path: path.stat().st_mtime, default=calibrated)
    return Preview(recipe, latest, names, calibrated, found)


def open_preview(preview: Preview, *, torch_dtype: torch.dtype = torch.float32) -> Any:
    """The merged pipeline as it is at the checkpoint, the average where one is kept; no style is set.

    Raises: UserError: something is wrong with the base.
    """
    if preview.calibrated is not None:
        return _open_adapted(preview, preview.calibrated).to(dtype=torch_dtype)
    pipeline = open_pipeline(base_of(preview.recipe), name="base")
    tensors = load_checkpoint(preview.checkpoint).tensors
    student = tensors.get("ema", tensors[STUDENT])
    prompts = StylePrompts(preview.styles, student["style_prompts.embeddings"].shape[1])
    for name, module in (("unet.", denoiser_of(pipeline)), ("style_prompts.", prompts)):
        module.load_state_dict({key.removeprefix(name): one for key, one in student.items() if key.startswith(name)})
    add_styles(pipeline, prompts)
    return pipeline.to(dtype=torch_dtype)


def _open_adapted(preview: Preview, calibrated: Path) -> Any:
    pipeline = open_pipeline(ModelSource(calibrated), name="the calibrated merge")
    prompts = read_side_car(calibrated)
    assert prompts is not None  # a merge has styles
    adapters = dict(prompts.adapters)
    for path, styles in preview.trained:
        checkpoint = load_checkpoint(path)
        found = adapters_at(checkpoint, [adapters[style] for style in styles])
        adapters |= {style: stored(one) for style, one in zip(styles, found, strict=True)}
        state = {**checkpoint.tensors[STUDENT], **checkpoint.tensors.get("ema", {})}
        shared = {key.removeprefix("unet."): one for key, one in state.items() if key.startswith("unet.")}
        if shared:
            denoiser_of(pipeline).load_state_dict(shared)
    prompts.adapters = adapters
    add_styles(pipeline, prompts)
    return pipeline


def _every(recipe: Recipe) -> str:
    return f"{recipe.checkpoint.every} steps"
