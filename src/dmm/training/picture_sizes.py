"""Of what sizes a merge's pictures are, and what its models are told of that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.families import Family, Frame
from dmm.maths.buckets import Size, bucket_sizes
from dmm.models.teachers import CheckedModel, check_model
from dmm.recipes.recipe import Recipe
from dmm.training.sources import base_of


def with_size(recipe: Recipe) -> Recipe:
    """A recipe that says the size of its pictures: the base's own, where it does not.

    Raises: UserError: something is wrong with the base, or it does not say.
    """
    if recipe.size is not None:
        return recipe
    base = check_model(base_of(recipe), name="base")
    return recipe.model_copy(update={"size": own_size(base.path, base.skeletons, base.family)})


def own_size(path: Path | str, skeletons: Mapping[str, Any], family: Family) -> int:
    """Of the pictures that a model was made for, in pixels a side; the shorter one.

    Raises: UserError: it does not say.
    """
    own = family.sample_size_of(skeletons[family.denoiser.name].config)
    if not own:
        raise UserError(f"size: {path} does not say of what size its pictures are; say it, such as 512.")
    side: int = own if isinstance(own, int) else min(own)
    return side * 2 ** (len(skeletons["vae"].config.block_out_channels) - 1)


def buckets_of(recipe: Recipe, size: int) -> list[Size]:
    """The sizes that the recipe's images are sorted into; none where all are square.

    Raises: UserError: there is none between the shortest and the longest side.
    """
    said = recipe.buckets
    if said is None:
        return []
    least, most = said.least or size // 2, said.most or 2 * size
    sizes = bucket_sizes(size, step=said.step, least=least, most=most)
    if not sizes:
        raise UserError(
            f"size.buckets: no size of {size} x {size} pixels' area has sides from {least} to {most} in steps of "
            f"{said.step}. Choose others."
        )
    return sizes


def frame_of(recipe: Recipe, size: int, base: CheckedModel) -> Frame:
    """What student and teachers are told of the pictures' size.

    Raises: UserError: the recipe says something of which the family's models read nothing.
    """
    said, whole = recipe.frame, Frame.whole(size, size)
    frame = Frame(said.original or whole.original, said.corner, said.target or whole.target)
    if frame != whole and not base.family.read_size(frame):
        raise UserError(f"frame: {base.family.title} models read nothing of a picture's size; leave it out.")
    return frame
