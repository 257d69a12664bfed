"""The models of an evaluation: the student, and its teachers as they are named or as the merge's recipe tells."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dmm.errors import UserError
from dmm.evaluation.held_out import Model
from dmm.files.digest import sha256
from dmm.files.runs import RECIPE
from dmm.formats.lora import is_lora, lora_file
from dmm.formats.tensors import read_header
from dmm.models.side_car import read_side_car
from dmm.models.style_names import STYLES_FOLDER
from dmm.models.teachers import ModelSource, check_model, locate, open_pipeline
from dmm.pipeline.styled import load_pipeline
from dmm.recipes.recipe import Recipe, load_recipe
from dmm.training.preflight import teacher_source


@dataclass(frozen=True)
class Models:
    """Who takes part."""

    student: Model
    teachers: dict[str, Model]
    """By style."""
    base: Model | None
    """Where it is known."""
    recipe: Recipe | None
    """Of the merge, where it is there."""


def find_models(
    student: str, teachers: Mapping[str, str], base: str | None, device: torch.device, *, allow_pickle: bool = False
) -> Models:
    """Find and check the models of an evaluation, before anything is painted.

    Args:
        student: a merged model, or a stock one: a folder, a single file or a hub id.
        teachers: by style, a folder, a single file, a hub id, or a LoRA of the base; by default those that the merge's
            recipe names.
        base: by default the one of the recipe.
        device: where they shall run.
        allow_pickle: open pickles too.
    Raises: UserError: there are no teachers, one is not where it was, or is another than the one that was merged.
    """
    folder = locate(ModelSource(student, allow_pickle=allow_pickle))
    recipe = _recipe(folder, needed=not teachers)
    base = base or (recipe.base if recipe else None)
    base_path = None if base is None else locate(ModelSource(base))
    # single files follow the base; one that is a single file itself, what the recipe or the file says
    configs = base_path if base_path is not None and base_path.is_dir() else recipe.config if recipe else None
    base_source = None if base_path is None else ModelSource(base_path, config=configs if base_path.is_file() else None)
    sources: dict[str, ModelSource] = {}
    skips: dict[str, int | None] = {}
    if teachers:
        sources = {
            name: _read_source(name, path, base_source, configs, allow_pickle) for name, path in teachers.items()
        }
    elif recipe is not None and base_source is not None:
        sources = {one.name: teacher_source(one, recipe.base, configs, ema=recipe.ema) for one in recipe.teachers}
        skips = {one.name: one.clip_skip or None for one in recipe.teachers}
    if not sources:
        raise UserError(
            f"{student} has no {RECIPE} that names its teachers; name them with --teacher NAME=PATH, one a style."
        )
    found = {name: _model(name, source, device, skips.get(name)) for name, source in sources.items()}
    if not teachers:
        _check_unchanged(folder, found)
    base_model = None if base_source is None else _model("base", base_source, device, None)
    return Models(_student(student, folder, configs, device, allow_pickle), found, base_model, recipe)


def _recipe(folder: Path, *, needed: bool) -> Recipe | None:
    if not (folder / RECIPE).is_file():
        return None
    try:
        return load_recipe(folder / RECIPE)
    except UserError:  # its files may have moved since
        if needed:
            raise
        return None


def _read_source(
    name: str, path: str, base: ModelSource | None, configs: Path | None, allow_pickle: bool
) -> ModelSource:
    place = Path(path).expanduser()
    is_pipeline = (place / "model_index.json").is_file()
    weights = lora_file(place) if place.is_dir() and not is_pipeline else place
    if not weights.is_file():
        return ModelSource(path, allow_pickle=allow_pickle)
    if not is_lora(read_header(weights, allow_pickle=allow_pickle).tensors):
        return ModelSource(path, config=configs, allow_pickle=allow_pickle)
    if base is None:
        raise UserError(f"teacher '{name}': {path} is a LoRA; name the model that it was trained on with --base.")
    return replace(base, loras=((place, 1.0),), allow_pickle=allow_pickle)


def _model(name: str, source: ModelSource, device: torch.device, clip_skip: int | None) -> Model:
    checked = check_model(source, name="base" if name == "base" else f"teacher '{name}'")

    def open_model(dtype: torch.dtype) -> Any:
        return open_pipeline(source, torch_dtype=dtype).to(device)

    return Model(open_model, str(source), sha256(*checked.unet_files), clip_skip)


def _student(told: str, path: Path, configs: Path | None, device: torch.device, allow_pickle: bool) -> Model:
    source = ModelSource(path, config=configs if path.is_file() else None, allow_pickle=allow_pickle)
    files = list(check_model(source, name="student").unet_files)
    has_styles = path.is_dir() and read_side_car(path) is not None
    if has_styles:
        files += sorted((path / STYLES_FOLDER).glob("*.safetensors"))

    def open_model(dtype: torch.dtype) -> Any:
        if has_styles:
            return load_pipeline(path, torch_dtype=dtype, device=device)
        return open_pipeline(source, torch_dtype=dtype).to(device)

    return Model(open_model, told, sha256(*files))


def _check_unchanged(folder: Path, teachers: Mapping[str, Model]) -> None:
    prompts = read_side_car(folder)
    for one in prompts.provenance if prompts else ():
        teacher = teachers.get(one.name)
        if teacher is not None and teacher.sha256 != one.sha256:
            raise UserError(
                f"teacher '{one.name}': {teacher.source} is not the model that was merged: its sha256 begins with "
                f"{teacher.sha256[:10]}, that one's with {one.sha256[:10]}. Name the one that was, with --teacher."
            )
