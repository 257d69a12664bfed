"""``dmm merge --new``: a recipe for the models in a folder, that runs as it stands."""

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmm.errors import UserError
from dmm.files.outputs import check_file, new_file
from dmm.files.yaml import write_yaml
from dmm.planning.finding import Contents, Found, base_of_all, find_models
from dmm.recipes.recipe import Recipe, load_recipe
from dmm.training.preflight import check_merge

PROMPTS = "prompts.txt"
_SUBJECTS = (
    *("a portrait of a woman", "a portrait of an old man", "a child with a kite", "two friends at a table"),
    *("a cat", "a dog in the grass", "a bird on a branch", "a horse", "a house by a lake", "a street in the rain"),
    *(
        "a mountain village",
        "a castle on a hill",
        "a bowl of fruit",
        "a vase of flowers",
        "a sailing ship",
        "an old car",
    ),
)
_LIGHTS = ("in the morning", "at night", "in the snow")
_CPU = torch.device("cpu")


def new_recipe(folder: Path, path: Path, *, overwrite: bool) -> tuple[Recipe, Sequence[str]]:
    """Write a recipe for what is in a folder.

    Args:
        path: of the recipe; prompts, where the folder has nothing to learn on, are written beside it.
    Returns: the recipe, and what of the folder it leaves out.
    Raises: UserError: there is nothing to merge, or the recipe cannot be written.
    """
    check_file(path, overwrite=overwrite)
    contents = find_models(folder)
    base, why = base_of_all(contents)
    start = "base"
    if base is None:
        if not contents.models:
            raise UserError(
                f"'{folder}' holds {len(contents.loras)} LoRAs and no model{_first(contents.refused)}. Put the model "
                "there that they go on, or several models to be merged."
            )
        base, start = _commonest(contents), "average"
        why = "nothing tells which model the others came from: the student starts as their average"
    data, prompts = _data(contents, path)
    keys: dict[str, Any] = {"base": str(base.path.resolve()), "start": start, "teachers": [], "data": data}
    left = dict(contents.refused)
    teachers: list[dict[str, str]] = []
    for one in (*contents.models, *contents.loras):
        if one is base and start == "base":
            continue
        teacher = {"name": _name(one, teachers), "lora" if one.family is None else "model": str(one.path.resolve())}
        reason = _refusal({**keys, "start": "base"}, teacher, prompts)
        if reason is None:
            teachers.append(teacher)
        else:
            left[one.path] = reason
    if not teachers:
        raise UserError(f"'{folder}' holds nothing that can be merged{_first(left)}.")
    keys["teachers"] = teachers
    if prompts is not None:
        with new_file(path.parent / PROMPTS, overwrite=True) as temporary:
            temporary.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(_text(folder, keys, why, left), encoding="utf-8")
    recipe = load_recipe(path)
    check_merge(recipe, 1, _CPU, with_digests=False)
    return recipe, [f"{one.name}: {reason}" for one, reason in left.items()]


def _commonest(contents: Contents) -> Found:
    """The first model of the family that most are of; a folder rather than a file, whose configs it may lack."""
    families = [model.family for model in contents.models]
    family = max(families, key=families.count)
    of_family = [model for model in contents.models if model.family == family]
    return min(of_family, key=lambda one: (one.path.is_file(), one.path))


def _data(contents: Contents, path: Path) -> tuple[dict[str, Any], list[str] | None]:
    """What is learnt on, and prompts that are to be written for that."""
    if contents.images is not None:
        return {"images": str(contents.images.resolve())}, None
    if contents.prompts is not None:
        return {"synthesize": {"prompts": str(contents.prompts.resolve()), "count": 200}}, None
    prompts = [f"{subject} {light}" for light, subject in itertools.product(_LIGHTS, _SUBJECTS)]
    return {"synthesize": {"prompts": PROMPTS, "count": 200}}, prompts


def _refusal(keys: Mapping[str, Any], teacher: Mapping[str, str], prompts: list[str] | None) -> str | None:
    """Why a merge would refuse a teacher; None where it would not."""
    # what is learnt on is not what is asked here
    data = {"dataset": "none"} if prompts is not None else keys["data"]
    try:
        check_merge(Recipe.model_validate({**keys, "teachers": [teacher], "data": data}), 1, _CPU, with_digests=False)
    except UserError as error:
        return str(error).removeprefix(f"teacher '{teacher['name']}'").lstrip(": ")
    return None


def _name(one: Found, before: Sequence[Mapping[str, str]]) -> str:
    """A style's name after a file's."""
    stem = one.path.name if one.path.is_dir() else one.path.stem
    name = re.sub(r"[^\w. -]+", "-", stem).strip(" -_.") or "style"
    name = "all-styles" if name == "all" else name
    taken = {teacher["name"] for teacher in before}
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    return next(f"{name}{end}" for end in ends if f"{name}{end}" not in taken)


def _text(folder: Path, keys: Mapping[str, Any], why: str, left: Mapping[Path, str]) -> str:
    lines = [
        f"# A merge of what is in {folder.resolve()}: dmm merge --new wrote it.",
        f"# The base: {why}.",
        "# Styles are adapters on frozen weights; docs/merge.md tells of every key, dmm plan what it takes.",
    ]
    if left:
        lines.append("# Left out:")
        lines += [f"#   {os.path.relpath(one, folder)}: {' '.join(reason.split())}" for one, reason in left.items()]
    return "\n".join(lines) + "\n" + write_yaml(dict(keys))


def _first(left: Mapping[Path, str]) -> str:
    return "".join(f" ({one.name}: {' '.join(reason.split())})" for one, reason in list(left.items())[:1])
