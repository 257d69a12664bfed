"""A recipe of two stages as two recipes of one."""

from dmm.recipes.data import Data, Synthesize
from dmm.recipes.recipe import Recipe
from dmm.recipes.training import Training


def first_stage(recipe: Recipe) -> Recipe:
    """The recipe without what comes after."""
    return recipe.model_copy(update={"finetune": None})


def second_stage(recipe: Recipe) -> Recipe | None:
    """What comes after, on pictures that the teachers paint; it starts as the first stage ends, which it does not say.

    Returns: None where there is none.
    """
    if recipe.finetune is None:
        return None
    data = Data(synthesize=Synthesize(**recipe.finetune.synthesize.model_dump()))
    training = Training(**recipe.finetune.training.model_dump())
    return first_stage(recipe).model_copy(update={"data": data, "training": training})
