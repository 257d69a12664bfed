"""A model of a recipe, by the name that the recipe gives it."""

from typing import Self

from pydantic import model_validator

from dmm.recipes.parts import ExistingPath, Model, Name, Number, Part


class ScaledLora(Part):
    """A LoRA and how strongly it acts."""

    path: ExistingPath
    """Its file, or a folder that diffusers saved one to."""
    scale: Number = 1.0


class NamedModel(Part):
    """A full model, or one with LoRAs on it."""

    name: Name
    model: Model | None = None
    """A stock pipeline folder, a single file or a hub id; by default the base."""
    ema: bool = False
    """Of a ``model`` that is a single file: the running average of its weights, which some files hold beside them."""
    lora: ExistingPath | None = None
    """A LoRA that is put on ``model``: a file, or a folder that diffusers saved one to."""
    lora_scale: Number = 1.0
    """How strongly."""
    loras: tuple[ScaledLora, ...] = ()
    """Several, in place of ``lora``."""

    @property
    def all_loras(self) -> tuple[ScaledLora, ...]:
        """What is put on ``model``, whichever key says so."""
        return self.loras if self.lora is None else (ScaledLora.model_construct(path=self.lora, scale=self.lora_scale),)

    @model_validator(mode="after")
    def _check_loras(self) -> Self:
        if self.lora is not None and self.loras:
            raise ValueError(f"'{self.name}' has a lora and loras; move the one into the list of the others")
        if self.model is None and not self.all_loras:
            raise ValueError(f"'{self.name}' has neither a model nor a lora; name at least one")
        if self.ema and self.model is None:
            raise ValueError(f"'{self.name}' has ema but no model whose averaged weights it could mean; name the model")
        if self.lora is None and self.lora_scale != 1:
            raise ValueError(f"'{self.name}' has a lora_scale but no lora for it to scale; name a lora or leave it out")
        return self
