"""How many weights take part in a merge, told by models without any."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dmm.families import Family
from dmm.models.calibration import layers_of
from dmm.models.discriminator import build_head
from dmm.models.styles import StylePrompts
from dmm.recipes.recipe import Recipe
from dmm.training.calibrating import budget_of_rank, num_kept
from dmm.training.costs import HALF, Sizes

UNKNOWN_RANK = 16
"""What a style of a given error is taken to come to, before it is calibrated."""


def sizes_of(recipe: Recipe, family: Family, skeletons: Mapping[str, Any], styles: Sequence[str]) -> Sizes:
    """How many weights take part in a merge.

    Args:
        skeletons: the base's components.
        styles: the student's.
    """
    denoiser, *readers = (skeletons[component.name] for component in family.present(skeletons))
    with torch.device("meta"):
        prompts = StylePrompts(list(styles), 0 if recipe.styles.has_adapters else family.width(denoiser))
        head = build_head(family.anatomy.width(denoiser), len(styles))
    backbone = _num_weights(family.anatomy.cut(denoiser))
    has_adversary = recipe.losses.adversarial > 0
    return Sizes(
        denoiser=_num_weights(denoiser),
        style_prompts=_num_weights(prompts),
        readers=sum(map(_num_weights, readers)),
        backbone=backbone if has_adversary else 0,
        head=_num_weights(head) if has_adversary else 0,
        **adapter_sizes(recipe, denoiser),
        text_adapter=sum(_num_of_text(recipe, skeletons[one.name]) for one in family.clips),
    )


def adapter_sizes(recipe: Recipe, denoiser: Any) -> dict[str, int]:
    """Of :class:`dmm.training.costs.Sizes`, what is of styles that are adapters of a model."""
    adapter, calibrated = _num_of_adapter(recipe, denoiser), _num_calibrated(recipe, denoiser)
    return {"num_styles": len(recipe.teachers), "adapter": adapter, "calibrated": calibrated}


def _num_of_adapter(recipe: Recipe, denoiser: Any) -> int:
    """The parameters of a style's adapter, and the whole differences of what is no layer's weight, at most."""
    styles = recipe.styles
    if not styles.has_adapters:
        return 0
    if styles.num_bytes is not None:
        return styles.num_bytes // HALF
    # what an error comes to is known only once the teachers were looked at
    return budget_of_rank(denoiser, styles.rank or UNKNOWN_RANK) + _num_offsets(denoiser)


def _num_calibrated(recipe: Recipe, denoiser: Any) -> int:
    if not recipe.styles.has_adapters:
        return 0
    return budget_of_rank(denoiser, num_kept(recipe.styles)) + _num_offsets(denoiser)


def _num_offsets(denoiser: Any) -> int:
    layers = layers_of(denoiser)
    return sum(parameter.numel() for name, parameter in denoiser.named_parameters() if name not in layers)


def _num_of_text(recipe: Recipe, encoder: Any) -> int:
    """The parameters of what a style changes of a text encoder, at most."""
    rank = recipe.styles.text_rank
    if not rank or recipe.styles.num_bytes is not None:  # which are those of all that a style changes
        return 0
    shapes = [parameter.shape for parameter in encoder.parameters()]
    return sum(min(rank, *one) * sum(one) if len(one) == 2 else one.numel() for one in shapes)


def _num_weights(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
