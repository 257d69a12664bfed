"""A merge that is under way as a model: the newest checkpoint, with the styles that it has by then."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmm.errors import UserError
from dmm.families import denoiser_of
from dmm.files.runs import CHECKPOINTS, RECIPE, find_run
from dmm.models.side_car import read_side_car
from dmm.models.styles import StylePrompts
from dmm.models.teachers import locate, open_pipeline
from dmm.pipeline.styled import add_styles
from dmm.recipes.recipe import Recipe, load_recipe
from dmm.training.checkpoint import load_checkpoint, newest_checkpoint
from dmm.training.preflight import base_of


@dataclass(frozen=True)
class Preview:
    """What a run has to show.

    Attributes:
        checkpoint: the newest that is whole.
        styles: the student's.
    """

    recipe: Recipe
    checkpoint: Path
    styles: list[str]


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
    newest = newest_checkpoint(run.folder / CHECKPOINTS)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint to paint with yet; its recipe saves one every {_every(recipe)}.")
    names = [*(earlier.names if earlier else []), *(teacher.name for teacher in recipe.teachers)]
    return Preview(recipe, newest, names)


def open_preview(preview: Preview, *, torch_dtype: torch.dtype = torch.float32) -> Any:
    """The merged pipeline as it is at the checkpoint, the average where one is kept; no style is set.

    Raises: UserError: something is wrong with the base.
    """
    pipeline = open_pipeline(base_of(preview.recipe), name="base")
    tensors = load_checkpoint(preview.checkpoint).tensors
    student = tensors.get("ema", tensors["student"])
    prompts = StylePrompts(preview.styles, student["style_prompts.embeddings"].shape[1])
    for name, module in (("unet.", denoiser_of(pipeline)), ("style_prompts.", prompts)):
        module.load_state_dict({key.removeprefix(name): one for key, one in student.items() if key.startswith(name)})
    add_styles(pipeline, prompts)
    return pipeline.to(dtype=torch_dtype)


def _every(recipe: Recipe) -> str:
    return f"{recipe.checkpoint.every} steps"
