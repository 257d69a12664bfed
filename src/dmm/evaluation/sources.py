"""The models of an evaluation: the student, and its teachers as they are named or as the merge's recipe tells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmm.errors import UserError
from dmm.evaluation.held_out import Model
from dmm.evaluation.known_teachers import NamedTeacher, check_unchanged, known_teachers, named_teacher, read_recipes
from dmm.families import Family
from dmm.files.digest import sha256
from dmm.files.runs import RECIPE
from dmm.models.side_car import read_side_car
from dmm.models.style_names import STYLES_FOLDER
from dmm.models.teachers import CheckedModel, ModelSource, check_model, locate, open_pipeline
from dmm.pipeline.styled import load_pipeline
from dmm.recipes.recipe import Recipe


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
    notes: tuple[str, ...] = ()
    """What the user should be told, and may be content with."""


def find_models(
    student: str,
    teachers: Mapping[str, NamedTeacher],
    base: str | None,
    device: torch.device,
    *,
    allow_pickle: bool = False,
) -> Models:
    """Find and check the models of an evaluation, before anything is painted.

    Args:
        student: a merged model, or a stock one: a folder, a single file or a hub id.
        teachers: by style; by default those of all styles that its recipe, those of the merges before it, and its
            side-car know.
        base: by default the one of the first merge.
        device: where they shall run.
        allow_pickle: open pickles too.
    Raises: UserError: there are no teachers, one is not where it was, or is another than the one that was merged.
    """
    folder = locate(ModelSource(student, allow_pickle=allow_pickle))
    recipes = read_recipes(folder)
    base_path = _base(base, recipes)
    # single files follow the base; one that is a single file itself, what the recipe or the file says
    written = recipes[-1].config if recipes else None
    configs = base_path if base_path is not None and base_path.is_dir() else written
    base_source = None if base_path is None else ModelSource(base_path, config=configs if base_path.is_file() else None)
    student_source = ModelSource(folder, config=configs if folder.is_file() else None, allow_pickle=allow_pickle)
    checked = check_model(student_source, name="student")
    known = known_teachers(folder, recipes, configs)
    chosen = {
        name: named_teacher(name, one, known.get(name), base_source, allow_pickle=allow_pickle)
        for name, one in teachers.items()
    } or known
    if not chosen:
        raise UserError(
            f"{student} has no {RECIPE} that names its teachers; name them with --teacher NAME=PATH, one a style."
        )
    base_model = None if base_source is None else _model("base", base_source, device, None, checked.family)
    try:
        found = {name: _model(name, one.source, device, one.clip_skip, checked.family) for name, one in chosen.items()}
    except UserError as error:
        if teachers:
            raise
        raise UserError(f"{error} Teachers that have moved are named with --teacher NAME=PATH.") from error
    notes = check_unchanged(folder, {name: (one.source, one.sha256) for name, one in found.items()}, teachers)
    recipe = recipes[0] if recipes else None
    return Models(_student(student, student_source, checked, device), found, base_model, recipe, tuple(notes))


def _base(named: str | None, recipes: Sequence[Recipe]) -> Path | None:
    """The model that a user names or, if it is still there, the one that the first merge began with."""
    if named is not None:
        return locate(ModelSource(named))
    if not recipes or (Path(recipes[-1].base).is_absolute() and not Path(recipes[-1].base).exists()):
        return None
    return locate(ModelSource(recipes[-1].base))


def _model(name: str, source: ModelSource, device: torch.device, clip_skip: int | None, family: Family) -> Model:
    checked = check_model(source, family=family, name="base" if name == "base" else f"teacher '{name}'")

    def open_model(dtype: torch.dtype) -> Any:
        return open_pipeline(source, torch_dtype=dtype).to(device)

    return Model(open_model, str(source), sha256(*checked.denoiser_files), clip_skip)


def _student(told: str, source: ModelSource, checked: CheckedModel, device: torch.device) -> Model:
    path, files = checked.path, list(checked.denoiser_files)
    has_styles = path.is_dir() and read_side_car(path) is not None
    if has_styles:
        files += sorted((path / STYLES_FOLDER).glob("*.safetensors"))

    def open_model(dtype: torch.dtype) -> Any:
        if has_styles:
            return load_pipeline(path, torch_dtype=dtype, device=device)
        return open_pipeline(source, torch_dtype=dtype).to(device)

    return Model(open_model, told, sha256(*files))
