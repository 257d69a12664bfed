"""The ledger: what a soup's own file says of what is in it, so that it can be made again with more or less in it.

``sd_merge_recipe`` holds the recipe, the sha256 of all that went in, and each shard's weight. Paths are relative to the
soup's folder. Nothing heavy at import: ``describing`` writes it.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmm.errors import UserError, nearest
from dmm.files.json import parse_json
from dmm.files.weights import check_beginning, read_declared
from dmm.recipes.parts import told
from dmm.soup.recipe import SoupRecipe

TYPE = "dmm soup"


@dataclass(frozen=True)
class Ledger:
    """What a soup says of itself.

    Attributes:
        recipe: that makes it again, its paths absolute.
        digests: sha256 by label (``base``, ``teacher 'a'``, ``the LoRA of teacher 'a'``) as they were.
        entries: of the shards, for people: name, source, sha256, weight and what it was trained on.
        greedy: how the models were chosen, where a score chose them.
    """

    recipe: SoupRecipe
    digests: dict[str, str]
    entries: list[dict[str, Any]]
    greedy: dict[str, Any] | None = None


def read_ledger(path: Path, models: Path | None = None) -> Ledger:
    """Read what a soup says of itself.

    Args:
        path: a soup: a single file, or a folder.
        models: a folder in which models are looked for, by their files' names, that are no longer where they were.
    Raises: UserError: it is no soup, or a model is neither where it was nor in ``models``.
    """
    # of a folder, the denoiser's comes first of those that have the name; all files of a soup have the ledger
    files = sorted(path.glob("*/diffusion_pytorch_model.safetensors"))[:1] if path.is_dir() else [path]
    found = next((recipe_in(_metadata_of(file)) for file in files), None)
    if not isinstance(found, dict) or found.get("type") != TYPE:
        raise UserError(f"{path} has no ledger, so it is no soup that `dmm soup` made. Name one, or a recipe (.yaml).")
    folder = path.resolve().parent

    def locate(name: str) -> str:
        there = Path(os.path.normpath(folder / name))
        elsewhere = models / there.name if models is not None else None
        if not there.exists() and elsewhere is not None and elsewhere.exists():
            there = elsewhere.resolve()
        is_id = name.count("/") == 1 and not name.startswith(".")
        return name if is_id and not there.exists() else str(there)

    try:
        recipe = SoupRecipe.model_validate(with_paths(found["recipe"], locate), context={"folder": folder})
        return Ledger(recipe, dict(found["sha256"]), list(found["shards"]), found.get("greedy"))
    except ValidationError as error:
        advice = "If its models were moved, name the folder that they are in with --models."
        raise UserError(f"{told(error.errors()[0], f'the ledger of {path}', {})} {advice}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The ledger of {path} is damaged ({error!r}). Make the soup again from its recipe.") from error


def without(ledger: Ledger, name: str) -> SoupRecipe:
    """The recipe of the soup that never had a shard.

    Raises: UserError: there is no such shard, or no other.
    """
    recipe = ledger.recipe
    if name not in recipe.names:
        near = nearest(name, recipe.names) or f"; its shards are {', '.join(sorted(recipe.names))}"
        raise UserError(f"The soup has no shard '{name}'{near}.")
    if len(recipe.names) == 1:
        raise UserError(f"'{name}' is the soup's only shard; nothing would be left.")
    plain = recipe.model_dump(mode="json", exclude_defaults=True)
    plain["teachers"] = [teacher for teacher in plain["teachers"] if teacher["name"] != name]
    for key in ("weights", "mbw", "shards"):
        plain.get(key, {}).pop(name, None)
    for pattern, weights in list(plain.get("blocks", {}).items()):
        weights.pop(name, None)
        if not weights:
            del plain["blocks"][pattern]
    return _validate({key: value for key, value in plain.items() if value != {}})


def with_more(ledger: Ledger, name: str, model: str, weight: float | None) -> SoupRecipe:
    """The recipe of the soup with one more shard.

    Args:
        model: a pipeline folder, a single file or a hub id.
        weight: by default 1.
    Raises: UserError: there is a shard of that name, or no such model.
    """
    recipe = ledger.recipe
    if name in recipe.names:
        raise UserError(f"The soup has a shard '{name}' already. Choose another name, or remove that one first.")
    plain = recipe.model_dump(mode="json", exclude_defaults=True)
    teacher = {"name": name, "lora" if recipe.kind == "lora" else "model": model}
    plain["teachers"] = [*plain["teachers"], teacher]
    if weight is not None:
        plain["weights"] = {**plain.get("weights", {}), name: weight}
    return _validate(plain)


def check_digests(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Check that models are those that a ledger tells of.

    Raises: UserError: naming the first that is not.
    """
    for label, digest in found.items():
        if expected.get(label, digest) != digest:
            raise UserError(
                f"{label} is not what the soup was made of: its sha256 is {digest[:12]}..., the ledger says "
                f"{expected[label][:12]}.... Put the original back, or make a new soup from a recipe."
            )


def _metadata_of(file: Path) -> Mapping[str, str]:
    if check_beginning(file):
        return {}
    metadata = read_declared(file)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def recipe_in(metadata: Mapping[str, str]) -> Any:
    """What a file, by whatever tool, says of the merge that it came from; None of one that says nothing readable."""
    try:
        return parse_json(metadata.get("sd_merge_recipe", "null"), "its sd_merge_recipe")
    except UserError:
        return None


def with_paths(plain: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A recipe's plain values, its paths changed."""
    keys = ("base", "origin", "config", "model", "lora", "path")
    changed = {key: change(value) if key in keys and value is not None else value for key, value in plain.items()}
    for parts in ("teachers", "loras"):
        if parts in plain:
            changed[parts] = [with_paths(part, change) for part in plain[parts]]
    return changed


def _validate(plain: dict[str, Any]) -> SoupRecipe:
    try:
        return SoupRecipe.model_validate(plain)
    except ValidationError as error:
        raise UserError(told(error.errors()[0], "the changed soup", {})) from error
