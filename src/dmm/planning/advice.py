"""The cheapest key of a recipe that makes a merge fit a memory."""

from collections.abc import Callable, Iterator
from typing import Any

from dmm.recipes.recipe import Recipe
from dmm.recipes.training import ADAPTER_DEFAULTS

Changes = dict[str, Any]
"""Of a recipe's keys, as ``--set`` has them."""


def cheapest(recipe: Recipe, fits: Callable[[Recipe], bool]) -> Changes | None:
    """What to change of a recipe, in the order of what it costs: time first, then what comes of the merge.

    Args:
        fits: whether a recipe's merge does.
    Returns: None where nothing of what is tried does.
    """
    return next((changes for changes in _tried(recipe) if fits(changed(recipe, changes))), None)


def _tried(recipe: Recipe) -> Iterator[Changes]:
    training = recipe.training
    yield {}
    yield from _smaller(recipe, {})
    slower: Changes = {}
    if not training.gradient_checkpointing:  # a third more computation
        slower = {"training.gradient_checkpointing": True}
        yield slower
        yield from _smaller(recipe, slower)
    if training.precision == "fp32":
        slower = {"training.precision": "bf16", **slower}
        yield slower
        yield from _smaller(recipe, slower)
    if recipe.losses.adversarial:
        slower = {"losses.adversarial": 0.0, **slower}
        yield from _smaller(recipe, slower)
    if training.ema_decay is not None:
        slower = {"training.ema_decay": None, **slower}
        yield from _smaller(recipe, slower)
    if recipe.styles.trained == "all":  # another method, which trains no shared weights
        yield {"styles": {"rank": 16}}
        yield {"styles": {"rank": 16}, "training.micro_batch_size": 1}
        yield {"styles": {"rank": 16}, "training.micro_batch_size": 1, "training.gradient_checkpointing": True}


def _smaller(recipe: Recipe, beside: Changes) -> Iterator[Changes]:
    size = min(recipe.training.micro_batch_size, recipe.training.batch_size) // 2
    while size:
        yield {"training.micro_batch_size": size, **beside}
        size //= 2


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """A recipe with some keys changed; one that gets adapters gets their training, too."""
    parts: dict[str, Changes] = {}
    if "styles" in changes:
        keep = ("precision", "gradient_checkpointing", "compile", "ema_decay")
        kept = {name: getattr(recipe.training, name) for name in keep}
        parts = {name: dict(ADAPTER_DEFAULTS[name]) for name in ("training", "losses")}
        parts["training"] |= kept
        recipe = recipe.model_copy(
            update={"styles": recipe.styles.model_copy(update={**changes["styles"], "train": None})}
        )
    for key, value in changes.items():
        part, _, name = key.partition(".")
        if name:
            parts.setdefault(part, {})[name] = value
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=update) for name, update in parts.items()}
    )


def told(changes: Changes) -> str:
    """As it is given on the command line."""
    return " ".join(f"--set {key}={_value(value)}" for key, value in changes.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{key}: {one}" for key, one in value.items()) + "}'"
    return "null" if value is None else str(value).lower()
