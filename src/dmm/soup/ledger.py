"""The ledger: what a soup's own file says of what is in it, so that it can be made again with more or less in it.

``sd_merge_recipe`` holds the recipe, the sha256 of all that went in, and each shard's weight; ``sd_merge_models`` and
``modelspec.*`` are what other tools read. Paths are relative to the soup's folder; nothing tells of when or by whom.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import dmm
from dmm.errors import UserError, nearest
from dmm.files.json import parse_json
from dmm.formats.configs import describe_as, describe_folder
from dmm.formats.tensors import read_header
from dmm.recipes.parts import told
from dmm.soup.models import OpenModel
from dmm.soup.plan import Plan
from dmm.soup.recipe import SoupRecipe
from dmm.soup.registry import METHODS

TYPE = "dmm soup"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
"""Of a folder, the file whose metadata hold the ledger."""

_PREDICTIONS = {"v_prediction": "v"}


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


def describe(
    plan: Plan, digests: Mapping[Path, str], output: Path, greedy: Mapping[str, object] | None = None
) -> dict[str, str]:
    """A soup's metadata.

    Args:
        digests: sha256 of every file that was read.
        output: where the soup will be.
        greedy: how the models were chosen.
    """
    recipe, models = plan.recipe, _labelled(plan)
    shas = {label: model_digest(model, digests) for label, model in models.items()}
    with_loras = [model for model in plan.teachers if model.loras]
    return {
        **(_describe_configs(plan, output) if plan.layout == "file" else {}),
        "modelspec.architecture": plan.family.architecture_of(plan.prediction_type),
        **(
            {"modelspec.prediction_type": _PREDICTIONS.get(plan.prediction_type, plan.prediction_type)}
            if plan.prediction_type
            else {}
        ),
        **describe_recipe(
            recipe.model_copy(update={"density": plan.density} if "density" in plan.method.options else {}),
            {**shas, **{_lora_label(model): _lora_digest(model, digests) for model in with_loras}},
            {
                **{shas[label]: _told_of(model.path.name, model.metadata) for label, model in models.items()},
                **{digests[path]: _told_of(path.name, {}) for model in with_loras for path in model.loras},
            },
            output,
            greedy,
        ),
    }


def describe_recipe(
    recipe: SoupRecipe,
    digests: Mapping[str, str],
    sources: Mapping[str, object],
    output: Path,
    greedy: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """The part of a soup's metadata that its recipe gives.

    Args:
        digests: sha256 by label, as :class:`Ledger` has them.
        sources: what is known of each sha256's model.
        output: where the soup will be.
    """
    weights = {name: recipe.weights.get(name, 1.0) for name in recipe.names}
    kind = METHODS[recipe.method].weights if recipe.method in METHODS else "scales"
    total = sum(weights.values())
    entries = [
        {
            "name": teacher.name,
            "source": ", ".join(lora.path.name for lora in teacher.all_loras) or Path(str(teacher.model)).name,
            "sha256": digests.get(f"the LoRA of teacher '{teacher.name}'", digests.get(f"teacher '{teacher.name}'")),
            "weight": weights[teacher.name] if kind == "scales" else weights[teacher.name] / total,
            **({"trained_on": recipe.shards[teacher.name]} if teacher.name in recipe.shards else {}),
        }
        for teacher in sorted(recipe.teachers, key=lambda teacher: teacher.name)
    ]
    plain = _with_paths(recipe.model_dump(mode="json", exclude_defaults=True), lambda path: _relative(path, output))
    ledger = {
        "type": TYPE,
        "version": dmm.__version__,
        "recipe": _in_order(plain, recipe),
        "sha256": dict(sorted(digests.items())),
        "shards": entries,
        **({"greedy": greedy} if greedy is not None else {}),
    }
    names = ", ".join(str(entry["name"]) for entry in entries)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"{recipe.method} of {names}",
        "modelspec.merged_from": ", ".join(str(entry["source"]) for entry in entries),
        "sd_merge_recipe": json.dumps(ledger, ensure_ascii=False),
        "sd_merge_models": json.dumps(dict(sorted(sources.items())), ensure_ascii=False),
    }


def read_ledger(path: Path, models: Path | None = None) -> Ledger:
    """Read what a soup says of itself.

    Args:
        path: a soup: a single file, or a folder.
        models: a folder in which models are looked for, by their files' names, that are no longer where they were.
    Raises: UserError: it is no soup, or a model is neither where it was nor in ``models``.
    """
    file = path / UNET_FILE if path.is_dir() else path
    found = _recipe_in(read_header(file).metadata)
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
        recipe = SoupRecipe.model_validate(_with_paths(found["recipe"], locate), context={"folder": folder})
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


def labelled_digests(plan: Plan, digests: Mapping[Path, str]) -> dict[str, str]:
    """Sha256 of what a plan reads, by label, as :class:`Ledger` has them."""
    found = {label: model_digest(model, digests) for label, model in _labelled(plan).items()}
    return {**found, **{_lora_label(model): _lora_digest(model, digests) for model in plan.teachers if model.loras}}


def model_digest(model: OpenModel, digests: Mapping[Path, str]) -> str:
    """Sha256 of a model: of its file; of a folder's, over the lines ``path sha256`` of its weight files."""
    if model.path.is_file():
        return digests[model.path]
    lines = "".join(f"{name} {digests[file.path]}\n" for name, file in sorted(model.files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _describe_configs(plan: Plan, output: Path) -> dict[str, str]:
    """What a single file says of its configs: of those that the plan has, or else of its first model's."""
    if plan.configs is not None:
        return describe_folder(plan.configs, output, plan.scheduler)
    first = next(model for model in (plan.base, plan.origin, *plan.teachers) if model is not None)
    return describe_as(first.path, first.metadata, output)


def _lora_label(model: OpenModel) -> str:
    return f"the LoRA of {model.label}"


def _lora_digest(model: OpenModel, digests: Mapping[Path, str]) -> str:
    """Sha256 of the LoRA on a model; of several, over the lines of theirs."""
    found = [digests[path] for path in model.loras]
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()


def _labelled(plan: Plan) -> dict[str, OpenModel]:
    return {model.label: model for model in (plan.base, plan.origin, *plan.teachers) if model is not None}


def _told_of(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    return {"name": name, "legacy_hash": None, "sd_merge_recipe": _recipe_in(metadata)}


def _recipe_in(metadata: Mapping[str, str]) -> Any:
    """What a file, by whatever tool, says of the merge that it came from; None of one that says nothing readable."""
    try:
        return parse_json(metadata.get("sd_merge_recipe", "null"), "its sd_merge_recipe")
    except UserError:
        return None


def _in_order(plain: dict[str, Any], recipe: SoupRecipe) -> dict[str, Any]:
    """The recipe with its teachers and weights sorted by name where their order means nothing."""
    if recipe.method in METHODS and METHODS[recipe.method].ordered:
        return plain
    plain["teachers"] = sorted(plain["teachers"], key=lambda teacher: teacher["name"])
    return {
        key: dict(sorted(value.items())) if key in ("weights", "mbw", "shards") else value
        for key, value in plain.items()
    }


def _with_paths(plain: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A recipe's plain values, its paths changed."""
    keys = ("base", "origin", "config", "model", "lora", "path")
    changed = {key: change(value) if key in keys and value is not None else value for key, value in plain.items()}
    for parts in ("teachers", "loras"):
        if parts in plain:
            changed[parts] = [_with_paths(part, change) for part in plain[parts]]
    return changed


def _relative(path: str, output: Path) -> str:
    if not Path(path).is_absolute():  # a hub id
        return path
    relative = os.path.relpath(path, output.resolve().parent).replace(os.sep, "/")
    # so that no name beside the soup is taken for a hub id
    return relative if relative.startswith(".") else f"./{relative}"


def _validate(plain: dict[str, Any]) -> SoupRecipe:
    try:
        return SoupRecipe.model_validate(plain)
    except ValidationError as error:
        raise UserError(told(error.errors()[0], "the changed soup", {})) from error
