"""One of the models that are merged."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import StrictBool, model_validator

from dmm.recipes.named_model import NamedModel
from dmm.recipes.parts import Folder, Model, Number, Whole, in_range


class Teacher(NamedModel):
    """A model whose style, which has its name, the student learns."""

    config: Folder | None = None
    """The stock pipeline folder whose configs a single file follows; by default the base."""
    vae: Model | None = None
    """A VAE of its own; by default that of ``model``."""
    clip_skip: Annotated[Whole, in_range(least=0, most=11)] = 0
    """How many of the text encoder's last layers are left out, as diffusers counts: other tools' "clip skip 2" is 1."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """By default what the model says."""
    allow_pickle: StrictBool = False
    """Open pickles too, with ``weights_only``."""
    weight: Annotated[Number, in_range(above=0)] = 1.0
    """How much of every batch, and of the loss, beside the other teachers: more for a style that lags."""

    @model_validator(mode="after")
    def _check_config(self) -> Self:
        if self.config is not None and not (self.model is not None and Path(self.model).is_file()):
            raise ValueError(
                f"'{self.name}' has a config, which only a model that is a single file needs; leave it out"
            )
        return self
