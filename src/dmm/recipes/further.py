"""What a merge that goes further takes from the one before, where its recipe does not say."""

from collections.abc import Mapping, Sequence
from typing import Any

from dmm.recipes.recipe import Recipe

_ALWAYS = (
    *("size", "training.precision", "training.gradient_checkpointing"),
    *("data.synthesize.steps", "data.synthesize.guidance"),
)
_OF_ITS_KIND = (
    *("losses.feature", "losses.adversarial", "losses.noise_weighting"),
    *("training.batch_size", "training.micro_batch_size", "training.learning_rate", "training.style_learning_rate"),
)
_RATES = ("training.learning_rate", "training.style_learning_rate")
_SIZES = ("styles.rank", "styles.size", "styles.error")
_SLOWER = 0.5
"""At a merge's own rate the first few hundred steps shake the earlier styles, where these share what is trained."""


def taken_from(
    earlier: Recipe, given: Mapping[str, Any], overridden: Sequence[str], *, has_adapters: bool
) -> dict[str, Any]:
    """Keys of a recipe, as ``training.precision``, and the values that the earlier merge had there.

    Losses, batches and rates where both merges' styles are of one kind; their size where these are adapters.
    Rates of style prompts are half of a merge's; an addition's, which were that once, are taken as they are.

    Args:
        given: the new recipe as its file has it; what it says stays.
        overridden: keys that are set over the file, and stay too.
        has_adapters: whether the new styles are adapters.
    """
    before = earlier.model_dump(mode="json")
    keys: tuple[str, ...] = _ALWAYS
    if earlier.styles.has_adapters == has_adapters:
        says_size = any(not _is_open(given, key) or _is_set(overridden, key) for key in _SIZES)
        keys += _OF_ITS_KIND if says_size or not has_adapters else (*_OF_ITS_KIND, *_SIZES)
    rate = 1.0 if earlier.earlier or has_adapters else _SLOWER
    found = {key: _value(before, key) for key in keys}
    return {
        key: value * rate if key in _RATES else value
        for key, value in found.items()
        if value is not None and _is_open(given, key) and not _is_set(overridden, key)
    }


def _is_set(overridden: Sequence[str], key: str) -> bool:
    return any(f"{key}.".startswith(f"{one}.") for one in overridden)


def _value(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        recipe = recipe.get(part) if isinstance(recipe, Mapping) else None
    return recipe


def _is_open(given: Mapping[str, Any], key: str) -> bool:
    """Whether a recipe leaves a key to its default: the key is not there, and what is around it is keys and values."""
    *around, last = key.split(".")
    part: Any = given
    for name in around:
        # with pictures of one's own there are no prompts to be painted; any other part may be left out
        part = part.get(name, None if name in ("data", "synthesize") else {})
        if not isinstance(part, Mapping):
            return False
    return last not in part
