"""What a merge's weights take of memory and disk, by its recipe and part; in bytes.

What activations take beside them is not here: :mod:`dmm.planning` runs the models for that, without numbers.
"""

from dmm.recipes.recipe import Recipe
from dmm.training.costs import FULL, HALF, MOMENTS, Sizes


def trained(sizes: Sizes, recipe: Recipe) -> int:
    """How many weights are trained at a time, but for the discriminator's."""
    match recipe.styles.trained:
        case "all":
            return sizes.denoiser + sizes.style_prompts + sizes.num_styles * sizes.adapter
        case "adapters":  # one style after another
            return sizes.adapter
    return 0


def training_parts(sizes: Sizes, recipe: Recipe, *, num_teachers: int) -> dict[str, int]:
    """Of the memory of training, without activations, by part.

    Args:
        num_teachers: whose weights are there at a time.
    """
    frozen = frozen_bytes(recipe)
    weights = trained(sizes, recipe)
    learnt = weights + sizes.head
    shares = recipe.styles.trained == "all"
    return {
        "shared weights": (FULL if shares else frozen) * sizes.denoiser,
        "styles": FULL * (weights - sizes.denoiser if shares else weights),
        "gradients": FULL * learnt,
        "moments": MOMENTS * FULL * learnt,
        "average": FULL * weights if recipe.training.ema_decay is not None else 0,
        "teachers": frozen * num_teachers * sizes.denoiser,
        "discriminator": frozen * sizes.backbone + FULL * sizes.head,
    }


def student_bytes(sizes: Sizes, recipe: Recipe) -> int:
    """Of the memory for what is trained, and what it stands on: weights, gradients, moments, and an average."""
    return sum(training_parts(sizes, recipe, num_teachers=0).values()) - frozen_bytes(recipe) * sizes.backbone


def frozen_bytes(recipe: Recipe) -> int:
    """Of a weight that is not trained."""
    return FULL if recipe.training.precision == "fp32" else HALF


def checkpoint_bytes(sizes: Sizes, recipe: Recipe) -> int:
    """Of one checkpoint: weights and moments, and an average of the student."""
    weights = trained(sizes, recipe)
    averaged = weights if recipe.training.ema_decay is not None else 0
    return FULL * ((1 + MOMENTS) * (weights + sizes.head) + averaged)


def disk_parts(sizes: Sizes, recipe: Recipe) -> dict[str, int]:
    """Of all that a run writes beside the cache, by part; one checkpoint more than are kept, while one is written."""
    result = FULL * sizes.pipeline
    adapters = HALF * sizes.num_styles * (sizes.adapter + sizes.text_adapter)
    one, keep = checkpoint_bytes(sizes, recipe), recipe.checkpoint.keep
    apart = recipe.styles.trained == "adapters"  # where each style keeps its own
    return {
        "checkpoints": (sizes.num_styles * keep + 1 if apart else keep + 1) * one,
        "calibration": FULL * sizes.num_styles * sizes.calibrated,
        "untrained": result + adapters if recipe.styles.has_adapters and recipe.styles.trained != "none" else 0,
        "result": result + FULL * sizes.style_prompts + adapters,
    }
