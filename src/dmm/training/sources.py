"""Where a merge's models and its data come from, as its recipe says."""

from collections.abc import Sequence
from pathlib import Path

from dmm.data import CaptionedImages, ImageDataset, ImageFolder, Synthesis
from dmm.files.prompts import read_prompts
from dmm.models.teachers import ModelSource
from dmm.recipes.recipe import Recipe
from dmm.recipes.teacher import Teacher


def base_of(recipe: Recipe) -> ModelSource:
    """What gives the student its VAE and text encoder."""
    return ModelSource(recipe.earlier.model) if recipe.earlier else named_base(recipe)


def named_base(recipe: Recipe) -> ModelSource:
    """What LoRAs are put on, and whose configs single files follow."""
    return ModelSource(recipe.base, config=recipe.config, ema=recipe.ema)


def teacher_source(teacher: Teacher, base: str, configs: Path | None, *, ema: bool = False) -> ModelSource:
    """Where a recipe's teacher comes from.

    Args:
        base: the recipe's word for it, which a teacher without a model of its own takes.
        configs: the pipeline folder whose configs single files follow that have none of their own in the recipe; None
            where each finds its own.
        ema: the recipe's word for the base.
    """
    model = base if teacher.model is None else teacher.model
    return ModelSource(
        model,
        config=(teacher.config or configs) if Path(model).is_file() else None,
        loras=tuple((lora.path, lora.scale) for lora in teacher.all_loras),
        vae=teacher.vae,
        prediction_type=teacher.prediction_type,
        ema=ema if teacher.model is None else teacher.ema,
        allow_pickle=teacher.allow_pickle,
    )


def open_source(recipe: Recipe, styles: Sequence[str]) -> CaptionedImages | Synthesis:
    """What the recipe's data are made from.

    Args:
        styles: the student's.
    Raises: UserError: it cannot be read, or is empty.
    """
    data = recipe.data
    if data.images is not None:
        return ImageFolder(data.images)
    if data.dataset is not None:
        return ImageDataset(data.dataset)
    painted = data.synthesize
    assert painted is not None  # the recipe has one of the three
    return Synthesis(
        read_prompts(painted.prompts),
        painted.count * num_painters(recipe, styles),
        steps=painted.steps,
        guidance_scale=painted.guidance,
        seed=painted.seed,
    )


def num_painters(recipe: Recipe, styles: Sequence[str]) -> int:
    """How many models paint data, each style of a merged one being one."""
    if recipe.kind == "controlnet":  # the base paints what they guide
        return 1
    painters = len(styles if paints_earlier(recipe) else recipe.teachers)
    return painters + (len(styles) if paints_itself(recipe) else 0)


def paints_itself(recipe: Recipe) -> bool:
    """Whether the student, as it starts, paints data in each of its styles."""
    return recipe.data.synthesize is not None and recipe.data.synthesize.student > 0


def paints_earlier(recipe: Recipe) -> bool:
    """Whether the earlier student, in each of its styles, paints data beside the teachers."""
    return recipe.data.synthesize is not None and recipe.regularization > 0
