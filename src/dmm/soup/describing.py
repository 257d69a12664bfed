"""What a soup's file says of itself: its ledger, and what other tools read of merges.

``sd_merge_recipe`` holds the recipe, the sha256 of all that went in, and each shard's weight; ``sd_merge_models`` and
``modelspec.*`` are what other tools read. Paths are relative to the soup's folder; nothing tells of when or by whom.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dmm
from dmm.formats.configs import describe_as, describe_folder
from dmm.soup.ledger import TYPE, recipe_in, with_paths
from dmm.soup.models import OpenModel
from dmm.soup.plan import Plan
from dmm.soup.recipe import SoupRecipe
from dmm.soup.registry import METHODS

_PREDICTIONS = {"v_prediction": "v"}


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
    plain = with_paths(recipe.model_dump(mode="json", exclude_defaults=True), lambda path: _relative(path, output))
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
    return {"name": name, "legacy_hash": None, "sd_merge_recipe": recipe_in(metadata)}


def _in_order(plain: dict[str, Any], recipe: SoupRecipe) -> dict[str, Any]:
    """The recipe with its teachers and weights sorted by name where their order means nothing."""
    if recipe.method in METHODS and METHODS[recipe.method].ordered:
        return plain
    plain["teachers"] = sorted(plain["teachers"], key=lambda teacher: teacher["name"])
    return {
        key: dict(sorted(value.items())) if key in ("weights", "mbw", "shards") else value
        for key, value in plain.items()
    }


def _relative(path: str, output: Path) -> str:
    if not Path(path).is_absolute():  # a hub id
        return path
    relative = os.path.relpath(path, output.resolve().parent).replace(os.sep, "/")
    # so that no name beside the soup is taken for a hub id
    return relative if relative.startswith(".") else f"./{relative}"
