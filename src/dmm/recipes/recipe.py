"""The recipe of a merge: what is merged, from what data, how it is trained.

A field's name is its key in the file, and its default is the paper's value (DMM §A.3) where the paper has one and
styles are what they are in the paper; where they are adapters, as they are by default,
:data:`dmm.recipes.training.ADAPTER_DEFAULTS` comes first. What can be known without the models is
checked here, before they are loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ValidationInfo, field_validator, model_validator

from dmm.errors import nearest
from dmm.recipes.controls import CONTROL_LOSSES, check_controls
from dmm.recipes.data import Data
from dmm.recipes.finetune import Finetune
from dmm.recipes.parts import (
    AUTO,
    Folder,
    Model,
    Number,
    Part,
    Seed,
    Whole,
    check_model_name,
    in_range,
    read_recipe,
    write_recipe,
)
from dmm.recipes.picture_sizes import Buckets, Framing, check_size
from dmm.recipes.styles import Styles
from dmm.recipes.teacher import Teacher
from dmm.recipes.training import ADAPTER_DEFAULTS, Checkpoint, Logging, Losses, Training

_NEW_STARTS = ("base", "average")
_MOST_WITHOUT_SAMPLES = 2500  # steps


class Earlier(Part):
    """A merged model to which the teachers' styles are added, and which is kept as it is (DMM §3.5)."""

    model: Model
    """A folder or a hub id."""
    regularization: Annotated[Number, in_range(least=0, below=1)] = 0.5
    """The share of every batch, and of the loss, on which the student learns what the earlier model says in its own
    styles, drawn at random; at 0 it forgets them."""


class Recipe(Part):
    """A merge."""

    kind: Literal["unet", "controlnet"] = "unet"
    """What is merged: models, or ControlNets of one."""
    base: Model
    """Gives the student its VAE and text encoder and, by default, its start: a folder, a single file or a hub id. Of
    ControlNets it is the model that they guide, and the start is a copy of its encoder."""
    config: Folder | None = None
    """The stock pipeline folder whose configs and tokenizer a base that is a single file follows; by default what the
    file says, or else those of its family's first model, from the hub."""
    ema: bool = False
    """Of a base that is a single file: the running average of its weights, which some files hold beside them."""
    start: str = "base"
    """Whose weights the student begins with: ``base``, or the earlier merge, where there is one; ``average``, of the
    teachers; or any model."""
    earlier: Earlier | None = None
    """Set by ``dmm add``: what is merged further."""
    teachers: tuple[Teacher, ...]
    data: Data
    size: Annotated[Whole, in_range(least=8)] | None = None
    """Of the pictures, in pixels a side, a multiple of 8; by default the base's own."""
    buckets: Buckets | None = None
    """Sort images by their shape, in place of cutting them square. ``size: {buckets: 1024}`` says both."""
    frame: Framing = Framing()
    styles: Styles = Styles()
    training: Training = Training()
    losses: Losses = Losses()
    finetune: Finetune | None = None
    """A second stage, after which the result is what that has made of the first one's."""
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    seed: Seed = 0
    """Of everything random in training."""

    @field_validator("start")
    @classmethod
    def _locate_start(cls, start: str, info: ValidationInfo) -> str:
        try:
            return start if start in _NEW_STARTS else check_model_name(start, info)
        except ValueError as error:
            raise ValueError(f"{error}{nearest(start, _NEW_STARTS)}") from error

    @field_validator("teachers")
    @classmethod
    def _check_teachers(cls, teachers: tuple[Teacher, ...]) -> tuple[Teacher, ...]:
        if not teachers:
            raise ValueError("the list is empty, expected at least one teacher")
        names = [teacher.name for teacher in teachers]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(f"teachers {names.index(name)} and {i} are both named '{name}'; rename one")
        return teachers

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: int | None) -> int | None:
        return check_size(size)

    @property
    def regularization(self) -> float:
        """The share of every batch that keeps the earlier styles, which needs none where shared weights are frozen."""
        return self.earlier.regularization if self.earlier and self.styles.trained == "all" else 0.0

    @property
    def sample_interval(self) -> int | None:
        """Steps between two grids of samples; None for none, as where nothing is trained."""
        if self.styles.trained == "none":
            return None
        every = self.logging.sample_every
        return min(_MOST_WITHOUT_SAMPLES, -(-self.training.steps // 4)) if every == AUTO else every

    @property
    def log_interval(self) -> int:
        """Steps between two entries of the loss curves."""
        return self.logging.every

    @property
    def watch_interval(self) -> int | None:
        """Steps between two measurements of the score error; None for none."""
        return self.logging.score_error_every

    @model_validator(mode="before")
    @classmethod
    def _take_buckets_from_size(cls, given: Any) -> Any:
        size = given.get("size") if isinstance(given, dict) else None
        if isinstance(size, dict) and "buckets" in size:
            settings = {name: value for name, value in size.items() if name != "buckets"}
            return {**given, "size": size["buckets"], "buckets": settings}
        return given

    @model_validator(mode="after")
    def _check_buckets(self) -> Self:
        if self.buckets is None:
            return self
        if self.data.synthesize is not None or self.kind != "unet":
            raise ValueError("size has buckets, which are for images of data.images or data.dataset; name a number")
        if self.frame != Framing():
            raise ValueError("frame says one size, but size has buckets, of which each is told its own; leave it out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _take_base_from_earlier(cls, given: Any) -> Any:
        earlier = given.get("earlier") if isinstance(given, dict) else None
        if isinstance(earlier, dict) and "base" not in given and "model" in earlier:
            return {**given, "base": earlier["model"]}
        return given

    @model_validator(mode="before")
    @classmethod
    def _fill_in_for_adapters(cls, given: Any) -> Any:
        """The defaults where styles are adapters."""
        if not isinstance(given, dict):
            return given
        styles = given.get("styles", {})
        if isinstance(styles, Styles) and not styles.has_adapters:
            return given
        if isinstance(styles, dict) and styles.get("rank") == 0:
            return given
        for place, defaults in ADAPTER_DEFAULTS.items():
            given = _filled(given, place.split("."), defaults)
        return given

    @model_validator(mode="before")
    @classmethod
    def _fill_in_for_controls(cls, given: Any) -> Any:
        """The defaults where ControlNets are merged: of losses, and no samples."""
        if not isinstance(given, dict) or given.get("kind") != "controlnet":
            return given
        filled = dict(given)
        for name, defaults in (("losses", CONTROL_LOSSES), ("logging", {"sample_every": None})):
            part = given.get(name, {})
            if isinstance(part, dict):
                filled[name] = {**defaults, **part}
        return filled

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "controlnet":
            check_controls(self)
        elif self.data.conditions is not None:
            raise ValueError("data.conditions is for ControlNets; leave it out, or set kind to controlnet")
        elif self.losses.prediction:
            raise ValueError("losses.prediction is for ControlNets; leave it out, or set kind to controlnet")
        return self

    @model_validator(mode="after")
    def _check_config(self) -> Self:
        if self.config is not None and not Path(self.base).is_file():
            raise ValueError("there is a config, which only a base that is a single file needs; leave it out")
        return self

    @model_validator(mode="after")
    def _check_earlier(self) -> Self:
        if self.earlier is None:
            return self
        if self.start == "average":
            raise ValueError(
                "start is 'average', but a merge that goes further starts from the earlier one, or from a model that "
                "has the new styles already"
            )
        for teacher in self.teachers:
            if teacher.model is None and self.base == self.earlier.model:
                raise ValueError(
                    f"teacher '{teacher.name}' is a LoRA, and a merged model is not what it was made for; name the "
                    "model that it is put on, as its model or as the base"
                )
        return self

    @model_validator(mode="after")
    def _check_student_paints(self) -> Self:
        if self.data.synthesize and self.data.synthesize.student and self.start in _NEW_STARTS:
            raise ValueError(
                f"data.synthesize.student is {self.data.synthesize.student:g}, but the student starts without the "
                "styles that it should paint in; start from a merged model of them, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        # of one style, where these are trained by themselves
        least = len(self.teachers) + bool(self.regularization) if self.styles.trained == "all" else 1
        for place, size in (
            ("training", self.training.batch_size),
            ("finetune.training", self.finetune.training.batch_size if self.finetune else least),
        ):
            if size < least:
                raise ValueError(
                    f"{place}.batch_size is {size}, expected at least {least}: every teacher needs a sample in each "
                    "step"
                )
        return self


def _filled(given: dict[str, Any], place: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values, with defaults in the part at a place, which may be left out; what is around it must be there."""
    name, *within = place
    part = given.get(name, None if within else {})
    if not isinstance(part, dict):
        return given
    return {**given, name: _filled(part, within, defaults) if within else {**defaults, **part}}


def load_recipe(path: Path, overrides: Sequence[str] = (), *, may_be_gone: bool = False) -> Recipe:
    """Read the recipe of a merge; see :func:`dmm.recipes.parts.read_recipe`.

    Raises: UserError: the first mistake, with the line or the override that makes it.
    """
    return read_recipe(Recipe, path, overrides, may_be_gone=may_be_gone)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with all it was resolved to; :func:`load_recipe` reads an equal one.

    Raises: UserError: the file cannot be written.
    """
    write_recipe(recipe, path)
