"""An evaluation of merged ControlNets, from the recipe that they were merged by: the residual error of every control.

It is measured on pictures that no training has seen, which the base paints, where all conditions are made of pictures;
or else on the recipe's own images.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dmm
from dmm.data import ImageFolder, Synthesis, TrainingData, prepare_data
from dmm.data.control_images import Condition
from dmm.errors import UserError
from dmm.evaluation.residual_error import ResidualError, residual_errors
from dmm.families import denoiser_of
from dmm.formats.schedules import noise_schedule
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.controls import control_names, open_net
from dmm.recipes.recipe import Recipe

PAINTER = "/base"
"""Names the base as a painter; no control is named so."""


def evaluate_controls(
    folder: Path,
    recipe: Recipe,
    *,
    base: str | Path,
    teachers: Mapping[str, Path],
    prompts: Sequence[str] | None,
    num_images: int,
    num_draws: int = 1024,
    seed: int = 0,
    device: torch.device,
) -> dict[str, Any]:
    """Measure merged ControlNets against their teachers.

    Args:
        folder: of the merged ones.
        recipe: that they were merged by: what each is shown, and how pictures are painted.
        base: the model that they guide.
        teachers: ControlNets by control, of all or some.
        prompts: of the pictures; None for the recipe's own images.
        num_images: that the base paints.
        num_draws: of noise and timesteps for each control.
        seed: of these, and of the pictures.
    Returns: the figures, as ``report.json`` has them.
    Raises: UserError: a model is missing or damaged, a teacher is of no control, or an image cannot be shown.
    """
    pipeline = open_pipeline(ModelSource(base), name="base").to(device)
    denoiser = denoiser_of(pipeline)
    student = open_net(folder, denoiser).to(device)
    for name in teachers:
        if name not in control_names(student):
            raise UserError(f"There is no control '{name}'; there are {', '.join(control_names(student))}.")
    nets = {name: open_net(path, denoiser).to(device) for name, path in teachers.items()}
    data = _data(recipe, pipeline, list(nets), prompts, num_images, seed)
    errors = residual_errors(
        student, nets, denoiser, data, noise_schedule(pipeline.scheduler.config), num_draws=num_draws, seed=seed
    )
    return {
        "version": dmm.__version__,
        "model": str(folder),
        "base": str(base),
        "teachers": {name: str(path) for name, path in teachers.items()},
        "images": {"count": data.num_rows, "painted": prompts is not None},
        "draws": num_draws,
        "seed": seed,
        "residual_error": _figures(errors),
    }


def _figures(errors: Mapping[str, ResidualError]) -> dict[str, Any]:
    by_control = {
        name: {"residuals": one.mean, "prediction": one.prediction, "by_block": one.by_block}
        for name, one in errors.items()
    }
    mean = {
        "residuals": sum(one.mean for one in errors.values()) / len(errors),
        "prediction": sum(one.prediction for one in errors.values()) / len(errors),
    }
    return {"mean": mean, "by_control": by_control}


def _data(
    recipe: Recipe, pipeline: Any, names: Sequence[str], prompts: Sequence[str] | None, num_images: int, seed: int
) -> TrainingData:
    given = recipe.data.conditions or {}
    conditions = {
        name: Condition(column=one) if isinstance(one, str) else Condition(make=one.make)
        for name, one in given.items()
        if name in names
    }
    assert recipe.size is not None  # the recipe of a run says it
    source: Any
    painters: dict[str, Callable[[], Any]] = {}
    if prompts is None:
        if recipe.data.images is None:
            raise UserError("--prompts FILE is missing: name a file with what to paint, one prompt a line.")
        source = ImageFolder(recipe.data.images)
    else:
        columns = [name for name, one in conditions.items() if one.column is not None]
        if columns:
            raise UserError(
                f"--prompts: what '{columns[0]}' is shown comes with the recipe's images, and cannot be made of other "
                "pictures. Leave --prompts out."
            )
        painted = recipe.data.synthesize
        how: dict[str, Any] = {"steps": painted.steps, "guidance_scale": painted.guidance} if painted else {}
        # one that nobody has reason to give a training
        digest = hashlib.sha256(f"held out {seed}".encode()).digest()
        source = Synthesis(prompts, num_images, seed=int.from_bytes(digest[:7], "big"), **how)
        painters = {PAINTER: lambda: pipeline}
    return prepare_data(source, pipeline, painters, size=recipe.size, conditions=conditions)
