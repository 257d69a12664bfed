"""What recipes are made of: typed and checked values, parts without unknown keys, YAML in and out.

A field's name is its key in the file. Paths are relative to the recipe's folder. Nothing heavy is imported and nothing
is opened.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from dmm.errors import UserError, nearest
from dmm.files.outputs import new_file
from dmm.files.weights import is_lora_file
from dmm.files.yaml import Place, Places, parse_yaml, read_yaml, write_yaml

MAX_SEED = 2**32 - 1
"""torch's CPU generator reads no more than 32 bits of a seed."""

_WEIGHT_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def in_range(
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
Count = Annotated[Whole, in_range(least=1)]
Seed = Annotated[Whole, in_range(least=0, most=MAX_SEED)]


def _interval(value: Any) -> Any:
    steps = _whole(value)
    if steps == AUTO or (type(steps) is int and steps >= 1):
        return steps
    raise ValueError(f"found {_shown(value)}, expected a number of steps, {AUTO} or null")


AUTO: Literal["auto"] = "auto"
Interval = Annotated[int | Literal["auto"], BeforeValidator(_interval)]
"""Steps between two of something, or as many as suit the run."""


def _absolute(path: str | Path, info: ValidationInfo) -> Path:
    """A path as the recipe's folder sees it; outside of a file, as the working directory does."""
    folder: Path = (info.context or {}).get("folder", Path())
    try:
        named = folder / Path(path).expanduser()
        # a last name that is a link stays: a hub's cache links names to files without a suffix
        return named.parent.resolve() / named.name if named.name not in ("", "..") else named.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"'{path}' cannot be looked up: {error}") from error


def exists(path: Path) -> bool:
    """Whether there is such a file or folder, as far as this user can see."""
    try:
        return path.exists()
    except OSError:  # too long a name, or a folder that may not be looked into
        return False


def _existing(value: Any, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"found {_shown(value)}, expected a path")
    path = _absolute(value, info)
    if not exists(path) and not _may_be_gone(info):
        raise ValueError(f"there is no file or folder '{path}'; check the path")
    return path


def _may_be_gone(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("may_be_gone"))


def _folder(path: Path) -> Path:
    if exists(path) and not path.is_dir():
        raise ValueError(f"'{path}' is a file, expected a folder")
    return path


def _file(path: Path) -> Path:
    if exists(path) and not path.is_file():
        raise ValueError(f"'{path}' is a folder, expected a file")
    return path


def path_or_id(value: str, info: ValidationInfo) -> str:
    """What exists, as an absolute path; a hub id as it is; anything else is a path that is not there."""
    path = _absolute(value, info)
    if value and exists(path):
        return str(path)
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value) and path.suffix not in _WEIGHT_FILES
    if not is_id and value and _may_be_gone(info):
        return str(path)
    if not is_id or ("/" in value and exists(path.parent)):
        raise ValueError(
            f"there is no file or folder '{path}'; check the path" if value else "found '', expected a path"
        )
    return value


def check_model_name(value: str, info: ValidationInfo) -> str:
    """A model's path, made absolute, or its hub id.

    Raises: ValueError: it is neither, or a LoRA.
    """
    found = path_or_id(value, info)
    if found == value and "/" not in value:  # datasets have ids of one word, models do not
        raise ValueError(f"found '{value}', expected a path that exists or a hub id such as 'owner/name'")
    if is_lora_file(Path(found)):
        raise ValueError(
            f"{found} is a LoRA, not a full model; pass it as lora, and the model it was trained on as model"
        )
    return found


ExistingPath = Annotated[Path, BeforeValidator(_existing)]
Folder = Annotated[ExistingPath, AfterValidator(_folder)]
File = Annotated[ExistingPath, AfterValidator(_file)]
Model = Annotated[str, AfterValidator(check_model_name)]


def _name(name: str) -> str:
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


Name = Annotated[str, AfterValidator(_name)]
"""Of a style."""


class Part(BaseModel):
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


AnyRecipe = TypeVar("AnyRecipe", bound=Part)


def read_recipe(
    kind: type[AnyRecipe], path: Path, overrides: Sequence[str] = (), *, may_be_gone: bool = False
) -> AnyRecipe:
    """Read a recipe and check all that can be checked without the models.

    Args:
        kind: the recipe's class.
        path: a YAML file. Relative paths in it, and in ``overrides``, are relative to its folder; hub ids stay.
        overrides: each ``key=value`` with the value as YAML, set over what the file says, in their order:
            ``training.steps=10``, ``teachers.0.lora_scale=0.5``.
        may_be_gone: it is the record of a run, what it names may be elsewhere by now: paths need not exist.
    Returns: the recipe with all defaults filled in and all paths absolute.
    Raises: UserError: the first mistake, with the line or the override that makes it.
    """
    given, places = read_yaml(path)
    for override in overrides:
        _override(given, places, override)
    try:
        return kind.model_validate(given, context={"folder": path.parent, "may_be_gone": may_be_gone})
    except ValidationError as error:
        raise UserError(told(error.errors()[0], str(path), places)) from error


def write_recipe(recipe: Part, path: Path) -> None:
    """Write a recipe with all it was resolved to; :func:`read_recipe` reads an equal one.

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
    "dict_type": "keys and values",
}


def told(error: ErrorDetails, where: str, places: Places) -> str:
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
        case kind if kind in _EXPECTED:
            message = f"found {_shown(error['input'])}, expected {_EXPECTED[kind]}"
        case _:
            message = f"found {_shown(error['input'])}: {error['msg']}"
    # the place itself, or the nearest around it: what is missing has no line
    known_places = (place[:length] for length in range(len(place), 0, -1))
    source = next((places[known] for known in known_places if known in places), where)
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
