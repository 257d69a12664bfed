"""What libraries build of somebody's JSON files: checked before, and whatever they have against it as a sentence.

Libraries take a config at its word: they run into a text where a number belongs while they paint, build a thousand
million layers where it says so, and say what is wrong in the words of their own insides.
"""

import inspect
import math
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from diffusers import ModelMixin
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedModel

from dmm.errors import UserError
from dmm.files.json import read_json
from dmm.files.text import check_regular

_MOST = {
    r".*layers.*|.*_blocks?": 200,  # all models that there are have fewer; each is built, if only on the meta device
    r"sample_size": 8192,
    r"num_train_timesteps": 100_000,
}
"""The largest numbers, by the keys that they stand under."""
_MOST_OF_ALL = 2**31
_NEVER_ZERO = ("scaling_factor",)  # latents are divided by it
_NAMES = {int: "number", float: "number", str: "text", bool: "true or false"}
_LONGEST_LIST = {"trained_betas": 100_000}
_LONGEST = 300
_MOST_TOKENS = 1_000_000
_QUANTISED = "quantization_config"


@contextmanager
def building(what: str) -> Iterator[None]:
    """Within the block a library builds something of files; whatever it raises is a :class:`UserError`.

    Args:
        what: the files and what they are to become, as the error's first words: ``folder/unet describes no UNet``.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except BaseException as error:
        # libraries raise whatever their insides run into; those in Rust something that is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """The first sentence of what a library says; some begin with what comes in the next line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError | IndexError | ZeroDivisionError) or not lines:
        return f"{error} ({type(error).__name__})" if lines else type(error).__name__
    told = lines[0]
    for line in lines[1:]:
        if not told.endswith(":"):
            break
        told = f"{told} {line}"
    return told.rstrip(".")


def check_config(config: Mapping[str, Any], path: Path, kind: Any) -> None:
    """Check the values of a config before a library takes them at their word.

    Args:
        config: what ``path`` holds.
        kind: the class that will be built of it, whose arguments (in diffusers) or defaults (in transformers) tell each
            value's type.
    Raises: UserError: the weights are packed; or a value is of another type, or absurdly large.
    """
    if config.get(_QUANTISED) is not None:
        raise UserError(
            f"{path} has a {_QUANTISED}: the weights beside it are packed, and would be read as what they are not. Get "
            "the model in fp16, bf16 or fp32."
        )
    for key, value in config.items():
        _check_size(key, value, path)
    expected = _of_transformers(kind) if issubclass(kind, PreTrainedModel) else _of_diffusers(kind)
    for key, types_there in expected.items():
        if key in config and not _fits(config[key], types_there):
            names = " or ".join(sorted({_NAMES.get(one, one.__name__) for one in types_there - {list, NoneType}}))
            raise UserError(
                f"{path}: its {key} is {_shown(config[key])}; {kind.__name__} has a {names} there. Get another copy."
            )


def check_tokenizer(folder: Path, reader: Any, num_tokens: int | None = None) -> None:
    """Check that a tokenizer can be opened, and what it makes of texts be read.

    Args:
        reader: the config of the text encoder that reads it.
        num_tokens: that it is given, whatever the tokenizer says that it takes at most.
    Raises: UserError: a file of it is missing or damaged, or it belongs to another text encoder.
    """
    if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
        raise UserError(f"{folder} holds neither tokenizer.json nor vocab.json. Add the model's tokenizer.")
    config = read_json(folder / "tokenizer_config.json")
    for file in folder.iterdir():
        check_regular(file)
    for file in folder.glob("*.json"):
        if file.is_file():
            read_json(file)
    with building(f"{folder} holds no tokenizer that can be opened"):
        kind = CLIPTokenizer if str(config.get("tokenizer_class", "")).startswith("CLIP") else AutoTokenizer
        tokenizer: Any = kind.from_pretrained(folder, local_files_only=True)
        length, tokens = tokenizer.model_max_length, tokenizer("a cat").input_ids
        most = getattr(reader, "max_position_embeddings", _MOST_TOKENS)
        if num_tokens is None and not (isinstance(length, int) and 1 <= length <= most):
            raise ValueError(f"its model_max_length is {length}, the text encoder reads {most} tokens at most")
        tokenizer("a cat", padding="max_length", max_length=min(num_tokens or length, 100), truncation=True)
        highest = max([*tokenizer.get_vocab().values(), *tokens])
        if highest >= reader.vocab_size:
            raise ValueError(f"it has a token {highest}, the text encoder has {reader.vocab_size}")


def _check_size(key: str, value: Any, path: Path) -> None:
    if isinstance(value, list):
        if len(value) > _LONGEST_LIST.get(key, _LONGEST):
            raise UserError(f"{path}: its {key} has {len(value)} values, as no model's has. Get another copy.")
        for one in value:
            _check_size(key, one, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        most = next((most for pattern, most in _MOST.items() if re.fullmatch(pattern, key)), None)
        if (
            math.isnan(value)
            or (most is not None and value > most)
            or (value == 0 and key in _NEVER_ZERO)
            or (isinstance(value, int) and abs(value) > _MOST_OF_ALL)
        ):
            raise UserError(f"{path}: its {key} is {_shown(value)}, as no model's is. Get another copy.")


def _of_diffusers(kind: Any) -> dict[str, set[type]]:
    """The types of a class's arguments, where their annotations tell any."""
    found = {}
    for key, parameter in inspect.signature(kind.__init__, eval_str=True).parameters.items():
        expected = _atoms(parameter.annotation)
        # models take a list, of one value a block, wherever they take one value
        if issubclass(kind, ModelMixin) or re.search(r"(?i)list|tuple|ndarray", str(parameter.annotation)):
            expected |= {list} if expected else set()
        if parameter.default in (None, inspect.Parameter.empty):
            expected |= {NoneType} if expected else set()
        if expected:
            found[key] = expected
    return found


def _of_transformers(kind: Any) -> dict[str, set[type]]:
    """The types of a config's defaults; each may also be null, and a model of language has lists of ending tokens."""
    defaults = {key: one for key, one in vars(kind.config_class()).items() if isinstance(one, bool | int | float | str)}
    lists = {key for key in defaults if key.endswith("_token_id") and not kind.__name__.startswith("CLIP")}
    return {key: {type(one), NoneType} | ({list} if key in lists else set()) for key, one in defaults.items()}


def _atoms(annotation: Any) -> set[type]:
    """The classes that an annotation is made of, in whatever lists; empty where it may be anything."""
    origin = typing.get_origin(annotation)
    if annotation in (Any, inspect.Parameter.empty) or isinstance(annotation, str | typing.TypeVar):
        return set()
    if annotation is NoneType or annotation is Ellipsis:
        return {NoneType}
    if origin is typing.Literal:
        return {type(one) for one in typing.get_args(annotation)}
    if origin is dict:
        return {dict}
    if origin is not None:
        parts = [_atoms(one) for one in typing.get_args(annotation)]
        return set().union(*parts) if all(parts) else set()
    return {annotation} if inspect.isclass(annotation) and annotation not in (list, tuple) else set()


def _fits(value: Any, expected: set[type]) -> bool:
    if isinstance(value, list):
        return list in expected and all(_fits(one, expected) for one in value)
    if isinstance(value, bool):
        return bool(expected & {bool, float})  # where diffusers says "number" of what is a switch
    if isinstance(value, int):
        return bool(expected & {int, float})
    return type(value) in expected


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}..."
