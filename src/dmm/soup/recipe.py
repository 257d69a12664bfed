"""The recipe of a soup: what is merged and how, in the words of a merge's recipe."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dmm.errors import nearest
from dmm.recipes.named_model import NamedModel
from dmm.recipes.parts import Count, File, Folder, Model, Number, Part, Seed, Whole, in_range, read_recipe
from dmm.soup.registry import METHODS

MethodName = Literal[
    "soup",
    "greedy",
    "weighted_sum",
    "task_arithmetic",
    "add_difference",
    "slerp",
    "model_stock",
    "ties",
    "dare",
    "dare_ties",
    "extract",
]
"""Those of the registry, and ``extract``, which makes a LoRA of a difference."""

DENSITIES = {"ties": 0.2, "dare": 0.1, "dare_ties": 0.1}
"""The papers' own: TIES keeps the top fifth, DARE drops nine tenths."""

Share = Annotated[Number, in_range(above=0, most=1)]


class SoupTeacher(NamedModel):
    """A model that goes into the soup: by its name in the ledger, and in ``weights`` and ``blocks``."""


class Calibration(Part):
    """What a LoRA's factors are fitted to: noised pictures that the teacher paints."""

    prompts: File
    """A text file, one prompt a line."""
    count: Count = 16
    """Pictures."""
    samples: Count = 128
    """Noised ones, of these pictures."""
    steps: Annotated[Whole, in_range(least=1, most=1000)] = 25
    """Of the sampler, DPM-Solver++."""
    guidance: Annotated[Number, in_range(least=1)] = 7.0
    """Classifier-free guidance scale; 1 is none."""
    size: Annotated[Whole, in_range(least=8)] | None = None
    """Pixels a side; by default the teacher's own."""
    seed: Seed = 0
    """Of pictures and noise."""


class SoupRecipe(Part):
    """A soup."""

    kind: Literal["unet", "lora"] = "unet"
    """What comes out: a full model, or a LoRA."""
    method: MethodName
    base: Model | None = None
    """What the teachers were fine-tuned from; needed by the methods that work on differences, and by LoRAs."""
    ema: bool = False
    """Of a base that is a single file: the running average of its weights, which some files hold beside them."""
    origin: Model | None = None
    """Of ``task_arithmetic``: what the differences are taken from; by default the base."""
    teachers: tuple[SoupTeacher, ...]
    weights: dict[str, Number] = Field(default_factory=dict)
    """By the teachers' names; 1 where none is given. Averages divide them by their sum, differences are multiplied."""
    blocks: dict[str, dict[str, Number]] = Field(default_factory=dict)
    """Weights in parts of the model: a block, ``IN00-IN05`` or ``/regex/`` to weights; the last that fits counts."""
    mbw: dict[str, tuple[Number, ...]] = Field(default_factory=dict)
    """Weights by block as people share them: a teacher to as many numbers as there are blocks
    (26 or 20, by the architecture), BASE first."""
    shards: dict[str, str] = Field(default_factory=dict)
    """What a teacher was trained on, for the ledger: who asks for data to be forgotten finds whom to remove."""
    density: Share | None = None
    """Of TIES and DARE: the share of the differences that is kept; by default the papers'."""
    scale: Number = 1.0
    """Of TIES: what the merged difference is multiplied with."""
    seed: Seed = 0
    """Of DARE."""
    score: str | None = None
    """Of ``greedy``: a command that prints a number, more is better; {model} in it becomes the candidate's path."""
    text_encoder: Literal["average", "base"] = "average"
    """Merged by the method as all else is, or the base's."""
    missing: Literal["error", "base", "present"] = "error"
    """Of tensors that some models lack: refuse, take the base's, or merge the models that have them."""
    rank: Count | None = None
    """Of a LoRA that comes out; by default as the energy needs, or the ranks of all that go in."""
    calibration: Calibration | None = None
    """Of ``extract``: keep what moves the model's output most, in place of the most of each layer's difference."""
    energy: Share | None = None
    """How much of each layer's squared difference a LoRA that comes out keeps."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the written weights; by default that of the base, or of the first teacher."""
    config: Folder | None = None
    """The stock pipeline folder that names follow where layouts mix; by default the first folder among the models."""

    @property
    def names(self) -> list[str]:
        """The teachers' names."""
        return [teacher.name for teacher in self.teachers]

    @property
    def sources(self) -> list[tuple[str, str]]:
        """All that a soup is made of, files, folders and hub ids, and whose each is."""
        found = [("the base", self.base), ("the origin", self.origin), ("config", self.config)]
        for teacher in self.teachers:
            owner = f"teacher '{teacher.name}'"
            found += [(owner, teacher.model), *((owner, lora.path) for lora in teacher.all_loras)]
        return [(owner, str(source)) for owner, source in found if source is not None]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if not self.teachers:
            raise ValueError("teachers: the list is empty, expected at least one")
        for i, name in enumerate(self.names):
            if name in self.names[:i]:
                raise ValueError(f"teachers {self.names.index(name)} and {i} are both named '{name}'; rename one")
        named = {"weights": list(self.weights), "mbw": list(self.mbw), "shards": list(self.shards)}
        named.update({f"blocks.{pattern}": list(weights) for pattern, weights in self.blocks.items()})
        for key, names in named.items():
            for name in names:
                if name not in self.names:
                    near = nearest(name, self.names) or f"; they are {', '.join(self.names)}"
                    raise ValueError(f"{key}: there is no teacher '{name}'{near}")
        return self

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if (self.method == "extract") and self.kind != "lora":
            raise ValueError("the method 'extract' makes a LoRA; add 'kind: lora'")
        if self.ema and self.base is None:
            raise ValueError("ema is the base's, and there is none; give it to a teacher, or name a base")
        if self.calibration is not None and self.method != "extract":
            raise ValueError("calibration is for the method 'extract'; leave it out")
        if self.kind == "lora":
            return self._check_lora()
        method = METHODS[self.method]
        if method.needs_base and self.base is None:
            raise ValueError(f"the method '{self.method}' works on differences from the base; name a base")
        if any(teacher.model is None for teacher in self.teachers) and self.base is None:
            raise ValueError("a teacher that is a lora alone goes on the base; name a base")
        if self.method == "slerp" and len(self.teachers) != 2:
            raise ValueError(f"slerp goes from one model to another; found {len(self.teachers)} teachers, expected 2")
        if self.text_encoder == "base" and self.base is None:
            raise ValueError("text_encoder is 'base', but there is none; name a base")
        if (self.method == "greedy") != (self.score is not None):
            raise ValueError("the method 'greedy' and the key 'score' go together; give both or neither")
        if self.score is not None and "{model}" not in self.score:
            raise ValueError("score: the command has no {model} in it, which becomes the candidate's path")
        if self.rank or self.energy:
            raise ValueError("rank and energy are a LoRA's; add 'kind: lora' or leave them out")
        for key in ("origin", "density", "scale", "seed"):
            if key in self.model_fields_set and key not in method.options:
                raise ValueError(f"the method '{self.method}' has no {key}; leave it out")
        if method.weights == "none" and (self.weights or self.blocks or self.mbw):
            raise ValueError(
                f"the method '{self.method}' takes no weights; leave them out, or choose another such as weighted_sum"
            )
        return self._check_weights()

    def _check_lora(self) -> Self:
        if self.method not in ("extract", "soup", "weighted_sum", "task_arithmetic"):
            raise ValueError(
                f"the method '{self.method}' is not for LoRAs; choose soup, weighted_sum, task_arithmetic, or extract"
            )
        if self.blocks or self.mbw or self.origin is not None:
            raise ValueError("blocks, mbw and origin are for full models; leave them out of a LoRA's recipe")
        if self.method == "extract":
            if self.base is None or len(self.teachers) != 1:
                raise ValueError("'extract' takes a base and one teacher, whose difference becomes a LoRA")
            if (self.rank is None) == (self.energy is None):
                raise ValueError("'extract' needs to know how large: give one of rank and energy")
            if self.calibration is not None and self.rank is None:
                raise ValueError(
                    "a calibration deals ranks to layers from as many parameters as a rank everywhere has: give rank, "
                    "not energy"
                )
        elif any(teacher.lora is None or teacher.model is not None for teacher in self.teachers):
            raise ValueError("a LoRA is made of LoRAs: give every teacher one lora and no model, or use 'extract'")
        return self._check_weights()

    def _check_weights(self) -> Self:
        if self.method in METHODS and METHODS[self.method].weights == "relative":
            rules = {"weights": self.weights, **{f"blocks.{name}": weights for name, weights in self.blocks.items()}}
            for key, given in rules.items():
                weights = [given.get(name, self.weights.get(name, 1.0)) for name in self.names]
                if min(weights) < 0 or sum(weights) == 0:
                    raise ValueError(
                        f"{key}: found {', '.join(f'{weight:g}' for weight in weights)}; '{self.method}' divides them "
                        "by their sum, so none may be negative and one must be above 0"
                    )
            if self.mbw and len(self.teachers) != 2:
                raise ValueError(f"mbw with '{self.method}' says how much of one teacher is taken and not of the other")
            for name, values in self.mbw.items():
                if not all(0 <= value <= 1 for value in values):
                    raise ValueError(f"mbw.{name}: found numbers outside of 0 to 1, which shares of a model cannot be")
        if len(self.mbw) > 1 and METHODS[self.method].weights == "relative":
            raise ValueError("mbw: give the list of one teacher; the other gets what is left")
        return self


def load_soup_recipe(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> SoupRecipe:
    """Read the recipe of a soup; see :func:`dmm.recipes.parts.read_recipe`.

    Raises: UserError: the first mistake, with the line or the override that makes it.
    """
    return read_recipe(SoupRecipe, path, overrides)
