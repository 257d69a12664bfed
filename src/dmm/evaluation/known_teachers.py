"""Which teachers a merged model is known to have: by its recipe and those of the merges before it, and its side-car."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dmm.errors import UserError
from dmm.files.runs import RECIPE
from dmm.formats.lora import is_lora, lora_file
from dmm.formats.tensors import read_header
from dmm.models.side_car import read_side_car
from dmm.models.style_names import STYLES_FOLDER
from dmm.models.styles import Provenance
from dmm.models.teachers import ModelSource
from dmm.recipes.recipe import Recipe, load_recipe
from dmm.training.sources import teacher_source


@dataclass(frozen=True)
class Teacher:
    """Where a teacher comes from, and how it reads its captions."""

    source: ModelSource
    clip_skip: int | None = None


@dataclass(frozen=True)
class NamedTeacher:
    """A teacher as a user names it, in place of the one that is known."""

    path: str
    """A folder, a single file, a hub id, or a LoRA."""
    scale: float | None = None
    """Of a LoRA; by default that of the one whose place it takes, or 1."""


def read_recipes(folder: Path) -> list[Recipe]:
    """The recipe of a merged model and, where it went further than an earlier one, those of the merges before it.

    Args:
        folder: of the model; their files may have moved since.
    Raises: UserError: a recipe is damaged.
    """
    found: list[Recipe] = []
    while (folder / RECIPE).is_file() and len(found) < 1000:  # a folder that was moved may name itself
        found.append(load_recipe(folder / RECIPE, may_be_gone=True))
        earlier = found[-1].earlier
        if earlier is None:
            break
        folder = Path(earlier.model)
    return found


def known_teachers(folder: Path, recipes: Sequence[Recipe], configs: Path | None) -> dict[str, Teacher]:
    """The teachers of all styles of a merged model, as far as its recipes and its side-car tell.

    Args:
        recipes: of :func:`read_recipes`; without styles of its own, the model has the teachers of the first.
        configs: that single files follow.
    """
    by_recipe = {
        one.name: Teacher(teacher_source(one, recipe.base, configs, ema=recipe.ema), one.clip_skip or None)
        for recipe in reversed(recipes)
        for one in recipe.teachers
    }
    prompts = read_side_car(folder) if folder.is_dir() else None
    if prompts is None:
        return {one.name: by_recipe[one.name] for recipe in recipes[:1] for one in recipe.teachers}
    told = {one.name: _told(one) for one in prompts.provenance}
    return {name: by_recipe.get(name) or told[name] for name in prompts.names if name in by_recipe or name in told}


def named_teacher(
    name: str, named: NamedTeacher, known: Teacher | None, base: ModelSource | None, *, allow_pickle: bool
) -> Teacher:
    """What a user names, with all else that is known of the teacher whose place it takes.

    Args:
        known: that one.
        base: that LoRAs are put on, and whose folder or configs single files follow.
    Raises: UserError: a LoRA without a base, a scale of what is no LoRA, or a damaged file.
    """
    like = known or Teacher(ModelSource(named.path))
    path = Path(named.path).expanduser()
    is_pipeline = (path / "model_index.json").is_file()
    weights = lora_file(path) if path.is_dir() and not is_pipeline else path
    allow_pickle = allow_pickle or like.source.allow_pickle
    configs = None if base is None else Path(base.model) if Path(base.model).is_dir() else base.config
    configs = like.source.config or configs
    if not weights.is_file() or not is_lora(read_header(weights, allow_pickle=allow_pickle).tensors):
        if named.scale is not None:
            raise UserError(
                f"teacher '{name}': {named.path} is no LoRA, so that it has no scale; leave out ':{named.scale:g}'."
            )
        config = configs if path.is_file() else None
        source = replace(like.source, model=named.path, config=config, loras=(), allow_pickle=allow_pickle)
        return replace(like, source=source)
    before = like.source.loras
    scale = named.scale if named.scale is not None else before[0][1] if len(before) == 1 else 1.0
    on = like.source if known is not None and before else base
    if on is None:
        raise UserError(f"teacher '{name}': {named.path} is a LoRA; name the model that it was trained on with --base.")
    source = replace(
        on,
        loras=((path, scale),),
        vae=like.source.vae,
        prediction_type=like.source.prediction_type,
        allow_pickle=allow_pickle,
    )
    return replace(like, source=source)


def check_unchanged(folder: Path, found: Mapping[str, tuple[str, str]], named: Mapping[str, NamedTeacher]) -> list[str]:
    """Hold teachers against what the side-car says of those that were merged.

    Args:
        found: by style, a teacher's source and its sha256.
        named: those that a user has named.
    Returns: what is to be told of those that were named and are others.
    Raises: UserError: one that nobody has named is another.
    """
    notes = []
    prompts = read_side_car(folder) if folder.is_dir() else None
    for one in prompts.provenance if prompts else ():
        source, sha256 = found.get(one.name, ("", one.sha256))
        if sha256 != one.sha256:
            told = (
                f"teacher '{one.name}': {source} is not the model that was merged: its sha256 begins with "
                f"{sha256[:10]}, that one's with {one.sha256[:10]}"
            )
            if one.name not in named:
                raise UserError(f"{told}. Name the one that was, with --teacher.")
            notes.append(told)
    return notes


def _told(one: Provenance) -> Teacher:
    """A teacher as a side-car tells of it: a path or id, or LoRAs as :class:`ModelSource` writes them."""
    loras, _, model = one.source.rpartition(" on ")
    parts = [re.fullmatch(r"(.+) at ([-+.\de]+)", part) for part in loras.split(" and ")]
    pairs = tuple((Path(part[1]), float(part[2])) for part in parts if part)
    is_written_so = len(pairs) == len(parts) and not Path(one.source).exists()
    source = ModelSource(model, loras=pairs) if is_written_so else ModelSource(one.source)
    if (Path(source.model) / STYLES_FOLDER).is_dir():
        raise UserError(
            f"teacher '{one.name}': where it came from is not known but for {source.model}, a merged model. Name it "
            "with --teacher."
        )
    return Teacher(replace(source, prediction_type=one.prediction_type))
