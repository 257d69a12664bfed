"""What a plan needs to know of a recipe's models: their configs and headers, never their weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from dmm.data import CaptionedImages, Synthesis
from dmm.errors import UserError
from dmm.formats.folder import family_of_folder
from dmm.formats.skeleton import build_skeletons
from dmm.models.teachers import check_model
from dmm.planning.estimate import Estimate, estimate
from dmm.planning.memory import Activations
from dmm.planning.step import Shapes
from dmm.recipes.recipe import Recipe
from dmm.recipes.stages import second_stage
from dmm.training.costs import Sizes
from dmm.training.merge_plan import Plan
from dmm.training.model_sizes import sizes_of
from dmm.training.picture_sizes import own_size
from dmm.training.preflight import check_merge
from dmm.training.sources import base_of, open_source


class Looked:
    """A recipe's models and data, as far as a plan needs them.

    Args:
        shapes: of the models.
        styles: the student's.
        source: of the data; None where that is on the hub and was not fetched.
        far: models of the hub that were not looked at, and are taken to be as the base is.
    """

    def __init__(
        self, shapes: Shapes, styles: Sequence[str], source: CaptionedImages | Synthesis | None, far: Sequence[str]
    ) -> None:
        self.shapes, self.styles, self.source, self.far = shapes, styles, source, far
        self._activations: dict[bool, Activations] = {}

    def second_stage(self, recipe: Recipe) -> tuple[Recipe, "Looked"] | None:
        """A recipe's second stage, and what is known of that; None where there is none."""
        second = second_stage(recipe)
        if second is None:
            return None
        return second, Looked(self.shapes, self.styles, open_source(second, self.styles), self.far)

    def sizes(self, recipe: Recipe) -> Sizes:
        """How many weights take part."""
        return sizes_of(recipe, self.shapes.family, self.shapes.skeletons, self.styles)

    def estimate(
        self, recipe: Recipe, *, on_gpu: bool, num_bytes: float | None = None, num_processes: int = 1
    ) -> Estimate:
        """What a merge of this recipe takes, or of one that differs in what does not change its models."""
        sizes = self.sizes(recipe)
        activations = self._activations.setdefault(on_gpu, Activations(self.shapes, on_gpu=on_gpu))
        place = {"on_gpu": on_gpu, "num_bytes": num_bytes, "num_processes": num_processes}
        return estimate(recipe, sizes, activations, self.source, self.styles, **place)  # type: ignore[arg-type]


def look(recipe: Recipe, *, device: torch.device, num_processes: int) -> Looked:
    """Look at a recipe's models and data, and check all that can be.

    Of models that are named by their hub ids nothing is fetched but the base's configs.

    Raises: UserError: the first thing that is wrong.
    """
    named = [recipe.base, *(one.model for one in recipe.teachers if one.model is not None)]
    far = [name for name in dict.fromkeys(named) if not Path(name).exists()]
    if not far and (recipe.data.dataset is None or Path(recipe.data.dataset).exists()):
        plan = check_merge(recipe, num_processes, device, with_digests=False)
        return look_at(plan, open_source(recipe, plan.styles))
    base = base_of(recipe)
    if recipe.base in far:
        path = _configs_of(recipe.base)
        family = family_of_folder(path)
        skeletons = build_skeletons(path, family)
    else:
        checked = check_model(base, name="base")
        family, skeletons = checked.family, checked.skeletons
    shapes = Shapes(family, skeletons, recipe.size or own_size(str(recipe.base), skeletons, family))
    return Looked(shapes, [one.name for one in recipe.teachers], None, far)


def look_at(plan: Plan, source: CaptionedImages | Synthesis) -> Looked:
    """What was looked at already."""
    base = check_model(plan.base, family=plan.family, name="base")
    return Looked(Shapes(plan.family, base.skeletons, plan.size), plan.styles, source, ())


def _configs_of(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*/*.json"]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"base: {hub_id}: no such folder here, and the hub did not give its configs: {reason} Check the id, or "
            "name a folder."
        ) from error
