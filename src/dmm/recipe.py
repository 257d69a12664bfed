"""The recipe of a merge: what is merged, from what data, how it is trained; typed, checked, YAML in and out.

A field's name is its key in the file, and its default is the paper's value (DMM §A.3) where the
paper has one. Paths are relative to the recipe's folder. Nothing heavy is imported and nothing is opened:
what can be known without the models is checked here, before they are loaded.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from dmm.errors import UserError
from dmm.names import nearest
from dmm.outputs import new_file
from dmm.yaml import Place, Places, parse_yaml, read_yaml, write_yaml

MAX_SEED = 2**32 - 1
"""torch's CPU generator reads no more than 32 bits of a seed."""

_WEIGHT_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def _in_range(
    *, least: float | None = None, above: float | None = None, most: float | None = None, below: float | None = None
) -> AfterValidator:
    """Bounds of a number, told whole where they are broken: pydantic's own tell only the one that is."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    told = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def check(value: float) -> float:
        inside = (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )
        if not inside:
            raise ValueError(f"found {value if isinstance(value, int) else f'{value:g}'}, expected a number {told}")
        return value

    return AfterValidator(check)


def _whole(value: Any) -> Any:
    # 1e5 is a float to YAML and a number of steps to people
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[Whole, _in_range(least=1)]
Seed = Annotated[Whole, _in_range(least=0, most=MAX_SEED)]


def _absolute(path: str | Path, info: ValidationInfo) -> Path:
    """A path as the recipe's folder sees it; outside of a file, as the working directory does."""
    folder: Path = (info.context or {}).get("folder", Path())
    try:
        named = folder / Path(path).expanduser()
        # a last name that is a link stays: a hub's cache links names to files without a suffix
        return named.parent.resolve() / named.name if named.name not in ("", "..") else named.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"'{path}' cannot be looked up: {error}") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder that may not be looked into
        return False


def _existing(value: Any, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"found {_shown(value)}, expected a path")
    path = _absolute(value, info)
    if not _exists(path):
        raise ValueError(f"there is no file or folder '{path}'; check the path")
    return path


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"'{path}' is a file, expected a folder")
    return path


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"'{path}' is a folder, expected a file")
    return path


def _path_or_id(value: str, info: ValidationInfo) -> str:
    """What exists, as an absolute path; a hub id as it is; anything else is a path that is not there."""
    path = _absolute(value, info)
    if value and _exists(path):
        return str(path)
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value) and path.suffix not in _WEIGHT_FILES
    if not is_id or ("/" in value and _exists(path.parent)):
        raise ValueError(
            f"there is no file or folder '{path}'; check the path" if value else "found '', expected a path"
        )
    return value


def _model(value: str, info: ValidationInfo) -> str:
    found = _path_or_id(value, info)
    if found == value and "/" not in value:  # datasets have ids of one word, models do not
        raise ValueError(f"found '{value}', expected a path that exists or a hub id such as 'owner/name'")
    return found


ExistingPath = Annotated[Path, BeforeValidator(_existing)]
Folder = Annotated[ExistingPath, AfterValidator(_folder)]
File = Annotated[ExistingPath, AfterValidator(_file)]
Model = Annotated[str, AfterValidator(_model)]


class _Part(BaseModel):
    """What all parts of a recipe have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any) -> Any:
        # before anything else: a key that is misspelt is also a key that is missing, and this says it better
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                known = list(cls.model_fields)
                near = nearest(str(key), known) or f"; the keys are {', '.join(known)}"
                raise PydanticCustomError("unknown_key", "there is no such key{near}", {"key": key, "near": near})
        return given

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {k: v for k, v in serialize(self).items() if v is not None or fields[k].default is not None}


class Teacher(_Part):
    """A model whose style the student learns."""

    name: str
    """Of the style: letters, digits, spaces, '-', '_' and '.'."""
    model: Model | None = None
    """A stock pipeline folder, a single file or a hub id; by default the base."""
    lora: ExistingPath | None = None
    """A LoRA that is put on ``model``: a file, or a folder that diffusers saved one to."""
    lora_scale: Number = 1.0
    """How strongly."""
    config: Folder | None = None
    """The stock pipeline folder whose configs a single file follows; by default the base."""
    vae: Model | None = None
    """A VAE of its own; by default that of ``model``."""
    clip_skip: Annotated[Whole, _in_range(least=0, most=11)] = 0
    """How many of the text encoder's last layers are left out, as diffusers counts: other tools' "clip skip 2" is 1."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """By default what the model says."""
    allow_pickle: StrictBool = False
    """Open pickles too, with ``weights_only``."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        # a name is typed as in --style 'anime=0.7,photo=0.3', and ends up in names of files
        usable = all(unicodedata.category(letter)[0] in "LMN" or letter in " -_." for letter in name)
        if not usable or name != name.strip() or unicodedata.category(name[:1] or " ")[0] not in "LN":
            raise ValueError(
                f"found '{name}', expected a name of letters, digits, spaces, '-', '_' and '.' that begins with a "
                "letter or digit and does not end with a space"
            )
        if name == "all":
            raise ValueError("found 'all', which means every style on the command line; choose another name")
        return name

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.model is None and self.lora is None:
            raise ValueError(f"'{self.name}' has neither a model nor a lora; name at least one")
        if self.lora is None and self.lora_scale != 1:
            raise ValueError(f"'{self.name}' has a lora_scale but no lora for it to scale; name a lora or leave it out")
        if self.config is not None and not (self.model is not None and Path(self.model).is_file()):
            raise ValueError(
                f"'{self.name}' has a config, which only a model that is a single file needs; leave it out"
            )
        return self


class Synthesize(_Part):
    """Pictures that the teachers paint themselves."""

    prompts: File
    """A text file, one prompt a line."""
    count: Count = 1500
    """Pictures by each teacher."""
    steps: Annotated[Whole, _in_range(least=1, most=1000)] = 25
    """Of the sampler, DPM-Solver++."""
    guidance: Annotated[Number, _in_range(least=1)] = 7.0
    """Classifier-free guidance scale; 1 is none."""
    seed: Seed = 0
    """Of the starting noise."""


class Data(_Part):
    """What the student is trained on: one of three."""

    images: Folder | None = None
    """A captioned folder: ``metadata.jsonl`` with ``file_name`` and ``text``."""
    dataset: Annotated[str, AfterValidator(_path_or_id)] | None = None
    """A ``datasets`` dataset: a hub id, or a path."""
    synthesize: Synthesize | None = None
    """None but what the teachers paint."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        fields = list(type(self).model_fields)
        found = [name for name in fields if getattr(self, name) is not None]
        if len(found) != 1:
            raise ValueError(f"found {' and '.join(found) or 'nothing'}, expected one of {', '.join(fields)}")
        return self


class Training(_Part):
    """How the student is trained, with AdamW."""

    steps: Count = 100_000
    batch_size: Count = 320
    """Samples of a step, over all processes."""
    micro_batch_size: Count = 20
    """How many samples, at most, a process computes at a time; gradients are accumulated over the rest."""
    learning_rate: Annotated[Number, _in_range(above=0, most=1)] = 1e-5
    style_learning_rate: Annotated[Number, _in_range(above=0, most=1)] | None = None
    """Of the style prompts and their MLP; by default ``learning_rate``."""
    lr_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """As diffusers names them."""
    warmup_steps: Annotated[Whole, _in_range(least=0)] = 0
    weight_decay: Annotated[Number, _in_range(least=0, most=1)] = 0.01
    """The paper does not say; AdamW's own default."""
    max_grad_norm: Annotated[Number, _in_range(above=0)] | None = 1.0
    """Gradients are scaled down to this norm; null: never. The paper does not say; diffusers' scripts clip at 1."""
    caption_dropout: Annotated[Number, _in_range(least=0, most=1)] = 0.1
    """The share of samples whose caption is dropped, for classifier-free guidance."""
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    """Of the computation; the student's weights are float32."""
    gradient_checkpointing: StrictBool = False
    """Compute activations twice rather than keep them: slower, in much less memory."""
    compile: StrictBool = False
    """``torch.compile`` the models."""
    ema_decay: Annotated[Number, _in_range(above=0, below=1)] | None = None
    """Of an exponential moving average of the student, which is then the result; by default there is none."""

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


class Losses(_Part):
    """Weights of the terms that are added to score distillation."""

    feature: Annotated[Number, _in_range(least=0)] = 0.001
    """Feature imitation, over the sum of the blocks' means."""
    adversarial: Annotated[Number, _in_range(least=0)] = 0.0

    # the adversary is not there yet: when it is, delete this check, and the paper's 0.01 becomes the default
    @field_validator("adversarial")
    @classmethod
    def _refuse_adversary(cls, weight: float) -> float:
        if weight > 0:
            raise ValueError(f"found {weight:g}, but there is no adversarial loss yet; set it to 0 or leave it out")
        return weight


class Checkpoint(_Part):
    """What is kept to go on from."""

    every: Count = 2500
    """Steps."""
    keep: Count = 3
    """How many of the newest."""


class Logging(_Part):
    """What a run tells of itself."""

    every: Count = 50
    """Steps between two entries of the loss curves."""
    trackers: tuple[
        Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"],
        ...,
    ] = ()
    """Where else the curves go, as accelerate names them."""
    sample_every: Count | None = 2500
    """Steps between two grids of samples; null: none."""
    sample_prompts: tuple[str, ...] = ()
    """What the samples show; by default the first captions of the data."""
    sample_steps: Annotated[Whole, _in_range(least=1, most=1000)] = 25
    sample_guidance: Annotated[Number, _in_range(least=1)] = 7.0


class Recipe(_Part):
    """A merge."""

    kind: Literal["unet"] = "unet"
    """What is merged."""
    base: Model
    """Gives the student its VAE and text encoder and, by default, its start: a folder, a single file or a hub id."""
    start: str = "base"
    """Whose weights the student begins with: ``base``; ``average``, of the teachers; or any model."""
    teachers: tuple[Teacher, ...]
    data: Data
    size: Annotated[Whole, _in_range(least=8)] = 512
    """Of the pictures, in pixels a side; a multiple of 8."""
    training: Training = Training()
    losses: Losses = Losses()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    seed: Seed = 0
    """Of everything random in training."""

    @field_validator("kind", mode="before")
    @classmethod
    def _refuse_controlnet(cls, kind: Any) -> Any:
        if kind == "controlnet":
            raise ValueError("found 'controlnet', which comes later; only 'unet' can be merged so far")
        return kind

    @field_validator("start")
    @classmethod
    def _locate_start(cls, start: str, info: ValidationInfo) -> str:
        words = ("base", "average")
        try:
            return start if start in words else _model(start, info)
        except ValueError as error:
            raise ValueError(f"{error}{nearest(start, words)}") from error

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
    def _check_size(cls, size: int) -> int:
        if size % 8:
            raise ValueError(
                f"found {size}, expected a multiple of 8; {size // 8 * 8} and {size // 8 * 8 + 8} are near"
            )
        return size

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.training.batch_size < len(self.teachers):
            raise ValueError(
                f"training.batch_size is {self.training.batch_size}, expected at least {len(self.teachers)}: every "
                "teacher needs a sample in each step"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check all that can be checked without the models.

    Args:
        path: a YAML file. Relative paths in it, and in ``overrides``, are relative to its folder; hub ids stay.
        overrides: each ``key=value`` with the value as YAML, set over what the file says, in their order:
            ``training.steps=10``, ``teachers.0.lora_scale=0.5``.
    Returns: the recipe with all defaults filled in and all paths absolute.
    Raises: UserError: the first mistake, with the line or the override that makes it.
    """
    given, places = read_yaml(path)
    for override in overrides:
        _override(given, places, override)
    try:
        return Recipe.model_validate(given, context={"folder": path.parent})
    except ValidationError as error:
        raise UserError(_told(error.errors()[0], path, places)) from error


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe with all it was resolved to; :func:`load_recipe` reads an equal one.

    Raises: UserError: the file cannot be written.
    """
    text = write_yaml(recipe.model_dump(mode="json"))
    with new_file(path, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _override(given: dict[Any, Any], places: Places, override: str) -> None:
    name, equals, text = override.partition("=")
    source = f"--set {name}"
    if not equals or not name:
        raise UserError(f"--set '{override}': expected key=value, such as training.steps=10.")
    value, _ = parse_yaml(text, source)

    at: Any = given
    place: Place = ()
    parts = name.split(".")
    for part in parts[:-1]:
        step = _step(at, part, source)
        if isinstance(at, dict) and at.get(step) is None:
            at[step] = {}
        at, place = at[step], (*place, step)
    last = _step(at, parts[-1], source)
    at[last] = value
    place = (*place, last)
    for replaced in [known for known in places if known[: len(place)] == place]:
        del places[replaced]
    places[place] = source


def _step(at: Any, part: str, source: str) -> str | int:
    """The key or index that a part of an override's name means."""
    if isinstance(at, dict):
        return part
    if not isinstance(at, list):
        raise UserError(f"{source}: '{part}' is no key, since what is before it is {_shown(at)}.")
    if not part.isdecimal() or int(part) >= len(at):
        raise UserError(f"{source}: found '{part}', expected a number from 0 to {len(at) - 1} as the list has it.")
    return int(part)


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "model_type": "keys and values",
}


def _told(error: ErrorDetails, path: Path, places: Places) -> str:
    """One of pydantic's errors as a sentence."""
    context = error.get("ctx", {})
    place: Place = error["loc"]
    match error["type"]:
        case "unknown_key":
            place = (*place, context["key"])
            message = error["msg"]
        case "missing":
            message = "this key is missing"
        case "value_error":
            message = str(context["error"])
        case "literal_error":
            known = context["expected"]
            near = nearest(str(error["input"]), known.replace("'", "").replace(" or ", ", ").split(", "))
            message = f"found {_shown(error['input'])}, expected {known}{near}"
        case kind:
            message = f"found {_shown(error['input'])}, expected {_EXPECTED[kind]}"
    # the place itself, or the nearest around it: what is missing has no line
    known_places = (place[:length] for length in range(len(place), 0, -1))
    source = next((places[known] for known in known_places if known in places), str(path))
    name = ".".join(map(str, place))
    said = source == f"--set {name}" or not name
    return f"{source}: {message}." if said else f"{source}: {name}: {message}."


def _shown(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"'{value}'"
        case dict():
            return "keys and values"
        case list() | tuple():
            return "a list"
    return str(value)
