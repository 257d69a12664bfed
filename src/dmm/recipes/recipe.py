"""The recipe of a merge: what is merged, from what data, how it is trained.

A field's name is its key in the file, and its default is the paper's value (DMM §A.3) where the paper has one and
styles are what they are in the paper; where they are adapters, as they are by default, :data:`ADAPTER_DEFAULTS` comes
first. What can be known without the models is checked here, before they are loaded.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, StrictBool, ValidationInfo, field_validator, model_validator

from dmm.errors import nearest
from dmm.recipes.controls import CONTROL_LOSSES, Made, check_controls
from dmm.recipes.named_model import NamedModel
from dmm.recipes.parts import (
    AUTO,
    Count,
    File,
    Folder,
    Interval,
    Model,
    Number,
    Part,
    Seed,
    Whole,
    check_model_name,
    in_range,
    path_or_id,
    read_recipe,
    write_recipe,
)

_NEW_STARTS = ("base", "average")
_MOST_WITHOUT_SAMPLES = 2500  # steps


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


class Synthesize(Part):
    """Pictures that the teachers paint themselves."""

    prompts: File
    """A text file, one prompt a line."""
    count: Count = 1500
    """Pictures by each teacher."""
    steps: Annotated[Whole, in_range(least=1, most=1000)] = 25
    """Of the sampler, DPM-Solver++."""
    guidance: Annotated[Number, in_range(least=1)] = 7.0
    """Classifier-free guidance scale; 1 is none."""
    seed: Seed = 0
    """Of the starting noise."""
    own: Annotated[Number, in_range(least=0, most=1)] = 0.0
    """The share of each style's samples that its own teacher painted; the others are any teacher's. 1 is DMM §3.4's
    fine-tuning."""
    student: Annotated[Number, in_range(least=0, most=1)] = 0.0
    """The share of each style's samples that the student painted in it, as it starts: where its own mistakes lead, and
    what the teacher makes of it (as in DAgger, arXiv:1011.0686). For a start that has the styles."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.own + self.student > 1 + 1e-9:
            raise ValueError(f"own {self.own:g} and student {self.student:g} are shares of one whole; lower one")
        return self


class Data(Part):
    """What the student is trained on: one of three."""

    images: Folder | None = None
    """A captioned folder: ``1.txt`` beside ``1.png``, kohya's ``10_concept/``, or ``metadata.jsonl``."""
    dataset: Annotated[str, AfterValidator(path_or_id)] | None = None
    """A ``datasets`` dataset: a hub id, or a path."""
    synthesize: Synthesize | None = None
    """None but what the teachers paint; of ControlNets, what the base does."""
    conditions: dict[str, str | Made] | None = None
    """Of ControlNets: by control, what it is shown of a picture. A text names the key of ``metadata.jsonl`` whose value
    is the file of the condition image; ``{make: edges}`` has it made of the picture."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        fields = ["images", "dataset", "synthesize"]
        found = [name for name in fields if getattr(self, name) is not None]
        if len(found) != 1:
            raise ValueError(f"found {' and '.join(found) or 'nothing'}, expected one of {', '.join(fields)}")
        return self


def _num_bytes(text: Any) -> int:
    """A size such as 40MB as a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B", str(text).strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"found '{text}', expected a size such as 40MB")
    return round(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))


DEFAULT_RANK = 16
"""Of a UNet of 860 M parameters that is 34 MB a style in half precision, 2 %."""


class Styles(Part):
    """What a style brings: a prompt alone, as in the paper, or an adapter, a low-rank change of the weights."""

    rank: Annotated[Whole, in_range(least=0, most=4096)] | None = None
    """Of uniform adapters of as many bytes; :data:`DEFAULT_RANK` where nothing says how large a style is. 0: styles are
    prompts alone, the paper's method."""
    size: Annotated[str, AfterValidator(lambda text: _num_bytes(text) and text)] | None = None
    """In place of ``rank``: of a style on disk, on average, such as 40MB."""
    error: Annotated[Number, in_range(above=0, below=1)] | None = None
    """In place of ``rank``: about the score error that each style starts with, 1 being the start's."""
    train: Literal["adapters", "all", "none"] | None = None
    """What is trained: ``adapters``, the shared weights being frozen; ``all``; or ``none``: a merge without training.
    By default adapters, and of a rank of 0, all."""
    samples: Annotated[Whole, in_range(least=1)] = 128
    """Noised ones, of each style, by which its adapter is calibrated."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_rank(cls, given: Any) -> Any:
        if isinstance(given, dict) and all(given.get(name) is None for name in ("rank", "size", "error")):
            return {**given, "rank": DEFAULT_RANK}
        return given

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        given = [name for name in ("rank", "size", "error") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"found {' and '.join(given)}, which each say how large a style is; choose one")
        if not self.has_adapters and self.train not in (None, "all"):
            raise ValueError(
                f"train is {self.train}, but with a rank of 0 styles are prompts, which are trained with all weights; "
                "choose a rank, or leave train out"
            )
        return self

    @property
    def has_adapters(self) -> bool:
        """Whether styles are adapters."""
        return bool(self.rank) or self.size is not None or self.error is not None

    @property
    def trained(self) -> Literal["adapters", "all", "none"]:
        """What is trained."""
        return self.train or ("adapters" if self.has_adapters else "all")

    @property
    def num_bytes(self) -> int | None:
        """Of a style, on average, where the recipe says so."""
        return None if self.size is None else _num_bytes(self.size)


ADAPTER_DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {
        "steps": 1000,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-4,
        "lr_schedule": "cosine",
    },
    "losses": {"adversarial": 0.0},
    "finetune.training": {
        "steps": 300,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 5e-5,
        "lr_schedule": "cosine",
    },
}
"""What a recipe does not say where styles are adapters; steps are of each style. Eight models of 860 M parameters take
a night with it on a card of 24 GB: docs/merge.md has the sum, which no such card has confirmed."""


class Timesteps(Part):
    """How often a model of rectified flow is trained at which sigma; by default as its family is."""

    density: Literal["logit_normal", "uniform"] | None = None
    """Of sigmas, before they are shifted."""
    shift: Annotated[Number, in_range(above=0)] | None = None
    """Towards noise, above 1; by default what the base's scheduler says."""


class Training(Part):
    """How the student is trained, with AdamW; the paper's defaults, but :data:`ADAPTER_DEFAULTS` for adapters."""

    steps: Count = 100_000
    batch_size: Count = 320
    """Samples of a step, over all processes."""
    micro_batch_size: Count = 20
    """How many samples, at most, a process computes at a time; gradients are accumulated over the rest."""
    learning_rate: Annotated[Number, in_range(above=0, most=1)] = 1e-5
    style_learning_rate: Annotated[Number, in_range(above=0, most=1)] | None = None
    """Of the style prompts and their MLP, or the adapters, beside shared weights; by default ``learning_rate``."""
    lr_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """As diffusers names them."""
    warmup_steps: Annotated[Whole, in_range(least=0)] = 0
    weight_decay: Annotated[Number, in_range(least=0, most=1)] = 0.01
    """The paper does not say; AdamW's own default."""
    max_grad_norm: Annotated[Number, in_range(above=0)] | None = 1.0
    """Gradients are scaled down to this norm; null: never. The paper does not say; diffusers' scripts clip at 1."""
    caption_dropout: Annotated[Number, in_range(least=0, most=1)] = 0.1
    """The share of samples whose caption is dropped, for classifier-free guidance."""
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    """Of the computation; the student's weights are float32."""
    gradient_checkpointing: StrictBool = False
    """Compute activations twice rather than keep them: slower, in much less memory."""
    compile: StrictBool = False
    """``torch.compile`` the models."""
    ema_decay: Annotated[Number, in_range(above=0, below=1)] | None = None
    """Of an exponential moving average of the student, which is then the result; by default there is none."""
    timesteps: Timesteps | None = None
    """Of bases of rectified flow."""

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps and self.lr_schedule == "constant":
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but the lr_schedule 'constant' has no warm-up; choose "
                "'constant_with_warmup' or leave warmup_steps out"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected fewer than the {self.steps} steps")
        return self


class Losses(Part):
    """Weights of the terms that are added to score distillation."""

    noise_weighting: Annotated[Number, in_range(least=0, most=1)] = 0.0
    """p: a score weighs the signal's power at its timestep to the power of -p, so that noisy ones weigh more. 0 is the
    paper's loss; 1 compares predictions of noise as velocities. For students that predict noise."""
    feature: Annotated[Number, in_range(least=0)] = 0.001
    """Feature imitation, over the sum of the blocks' means."""
    adversarial: Annotated[Number, in_range(least=0)] = 0.01
    """The multi-class adversarial loss; at 0 there is no discriminator."""
    prediction: Annotated[Number, in_range(least=0)] = 0.0
    """Of ControlNets: what the base's UNet predicts with a control's residuals, beside the residuals themselves, which
    weigh 1; both relative to their size."""


class Checkpoint(Part):
    """What is kept to go on from."""

    every: Count = 2500
    """Steps."""
    keep: Count = 3
    """How many of the newest."""


class Logging(Part):
    """What a run tells of itself."""

    every: Count = 50
    """Steps between two entries of the loss curves."""
    trackers: tuple[
        Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"],
        ...,
    ] = ()
    """Where else the curves go, as accelerate names them."""
    score_error_every: Count | None = 500
    """Steps between two measurements of the relative score error; null: none."""
    sample_every: Interval | None = AUTO
    """Steps between two grids of samples; auto: four in a run, and one every 2500 steps at least; null: none."""
    sample_prompts: tuple[str, ...] = ()
    """What the samples show; by default the first captions of the data."""
    sample_steps: Annotated[Whole, in_range(least=1, most=1000)] = 25
    sample_guidance: Annotated[Number, in_range(least=1)] = 7.0


class FinetuneTraining(Training):
    """How the second stage trains: the paper's 10,000 steps of 10."""

    steps: Count = 10_000
    batch_size: Count = 10


class FinetuneSynthesize(Synthesize):
    """What the second stage learns on, and where its student is the first one's."""

    own: Annotated[Number, in_range(least=0, most=1)] = 1.0
    """As in the paper; lower it where ``student`` shall have a share."""


class Finetune(Part):
    """A second, short stage on what the teachers paint, each style on its own teacher's pictures (DMM §3.4)."""

    synthesize: FinetuneSynthesize
    """What they paint."""
    training: FinetuneTraining = FinetuneTraining()


class Earlier(Part):
    """A merged model to which the teachers' styles are added, and which is kept as it is (DMM §3.5)."""

    model: Model
    """A folder or a hub id."""
    regularization: Annotated[Number, in_range(least=0, below=1)] = 0.5
    """The share of every batch, and of the loss, on which the student learns what the earlier model says in its own
    styles, drawn at random; at 0 it forgets them."""


Pixels = Annotated[Whole, in_range(least=1, most=65_536)]
Offset = Annotated[Whole, in_range(least=0, most=65_536)]


class Framing(Part):
    """What student and teachers are told of the pictures' size, where their family reads it: by default that they
    never were larger than they are painted, which is what pipelines say where they are told nothing.
    """

    original: tuple[Pixels, Pixels] | None = None
    """Width and height before they were scaled; by default ``size``."""
    corner: tuple[Offset, Offset] = (0, 0)
    """What was cut off at the left and at the top."""
    target: tuple[Pixels, Pixels] | None = None
    """Width and height that are painted; by default ``size``."""


def check_size(size: int | None) -> int | None:
    """Pass a size of pictures on, if it is one that models have.

    Raises: ValueError: it is no multiple of 8.
    """
    if size is not None and size % 8:
        raise ValueError(f"found {size}, expected a multiple of 8; {size // 8 * 8} and {size // 8 * 8 + 8} are near")
    return size


class Buckets(Part):
    """Sizes of one area and many shapes, into which images are sorted, as kohya's scripts do it; none is stretched."""

    step: Annotated[Whole, in_range(least=1)] = 64
    """That all sides are multiples of, in pixels."""
    least: Count | None = None
    """The shortest side; by default half of ``size``."""
    most: Count | None = None
    """The longest side; by default twice ``size``."""


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
        """Steps between two grids of samples; None for none."""
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
