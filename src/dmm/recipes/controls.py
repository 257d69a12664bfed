"""What a recipe of ControlNets has of its own: what each control is shown, and what cannot be asked of it."""

from typing import TYPE_CHECKING

from dmm.errors import nearest
from dmm.recipes.parts import Part

if TYPE_CHECKING:
    from dmm.recipes.recipe import Recipe

CONTROL_LOSSES = {"feature": 0.0, "adversarial": 0.0}
"""ControlNets are compared by what they give to the UNet alone."""


class Made(Part):
    """A condition image that is made of the picture."""

    make: str
    """Which function makes it: ``edges``, ``colours``, ``silhouette``, ``canny``, or ``package.module:function``."""


def check_controls(recipe: "Recipe") -> None:
    """What a recipe of ControlNets has to say, and what says nothing of them.

    Raises: ValueError.
    """
    names = [teacher.name for teacher in recipe.teachers]
    for teacher in recipe.teachers:
        others = [key for key in teacher.model_fields_set if key not in ("name", "model", "weight")]
        others = [key for key in others if getattr(teacher, key) != type(teacher).model_fields[key].default]
        if teacher.model is None or others:
            found = f"found {', '.join(others)}" if others else "found none"
            raise ValueError(f"teacher '{teacher.name}' is a ControlNet, which has a model and no more; {found}")
    conditions = recipe.data.conditions or {}
    for name in names:
        if name not in conditions:
            raise ValueError(
                f"data.conditions does not say what '{name}' is shown; add {name}: KEY of metadata.jsonl, or {name}: "
                "{make: FUNCTION}"
            )
    for name, condition in conditions.items():
        if name not in names:
            raise ValueError(f"data.conditions has '{name}', and no teacher is named so{nearest(name, names)}")
        if isinstance(condition, str) and recipe.data.images is None:
            raise ValueError(
                f"data.conditions.{name} names a key of metadata.jsonl, but data has no folder of images; say "
                "{make: FUNCTION}"
            )
    painted = recipe.data.synthesize
    refused = {
        "earlier": recipe.earlier,
        "finetune": recipe.finetune,
        "losses.feature": recipe.losses.feature,
        "losses.adversarial": recipe.losses.adversarial,
        "logging.sample_every": recipe.logging.sample_every,
        "data.synthesize.own": painted and painted.own,
        "data.synthesize.student": painted and painted.student,
    }
    for key, value in refused.items():
        if value:
            raise ValueError(f"{key} is not for ControlNets; leave it out")
