"""The files of a stock pipeline folder that are known: what its index and those of shards name, and its configs."""

import re
from pathlib import Path
from typing import Any

import diffusers

from dmm.errors import UserError
from dmm.families import Family
from dmm.files.json import read_json
from dmm.files.text import check_regular

INDEX = "model_index.json"

_CONFIGS = (
    *("config.json", "scheduler_config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "spiece.model", "tokenizer.model", "chat_template.jinja"),
)
_LIBRARIES = ("diffusers", "transformers")


def read_index(folder: Path) -> dict[str, Any]:
    """Read the ``model_index.json`` of a folder.

    Raises: UserError: it is missing, is no JSON object, or names a part that is not in the folder.
    """
    path = folder / INDEX
    index = read_json(path)
    for name, value in index.items():
        if isinstance(value, list) and not (
            re.fullmatch(r"\w+", name) and len(value) == 2 and all(one is None or isinstance(one, str) for one in value)
        ):
            raise UserError(
                f"{path}: '{name}' is {value}, where a part's name has its library and its class. Save the folder "
                "again."
            )
    return index


def check_classes(index: dict[str, Any], path: Path, family: Family) -> None:
    """Check that an index names for every part the class that opens it.

    Raises: UserError: a part is not named, or is of another class.
    """
    kinds = {component.name: component.model_class.__name__ for component in family.components}
    optional = {part for one in family.components if one.optional for part in (one.name, one.tokenizer)}
    for name in (*kinds, "scheduler", *family.tokenizers):
        found = index.get(name)
        if name in optional and found in (None, [None, None]):
            continue
        if not isinstance(found, list):
            raise UserError(f"{path} names no {name}. The folder is incomplete; save it again.")
        library, kind = found
        if name in kinds:
            is_known = kind == kinds[name]
        elif name == "scheduler":
            is_known = str(kind).endswith("Scheduler") and hasattr(diffusers, kind)
        else:
            is_known = bool(re.fullmatch(r"\w+Tokenizer(Fast)?", str(kind)))
        if not is_known or library not in _LIBRARIES:
            expected = kinds.get(name) or f"a {name} of diffusers or transformers"
            raise UserError(
                f"{path} names '{kind}' of '{library}' as its {name}; {expected} was expected. Save the folder again "
                "with its own classes."
            )


def config_files(at: Path) -> list[Path]:
    """What there is beside weights in the folder of a pipeline's part, by the names that libraries know."""
    found = [at / name for name in _CONFIGS]
    for file in found:
        check_regular(file)
    return [file for file in found if file.is_file()]


def shards(index: Path) -> list[Path]:
    """The weight files that the index of a part's shards names, which lie beside it.

    Raises: UserError: it names none, or a file elsewhere.
    """
    found = read_json(index)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map that names its shards.")
    if not isinstance(found.get("metadata"), dict):  # the libraries take it for granted
        raise UserError(f"{index} has no metadata beside its weight_map, and so opens nowhere. Save the model again.")
    for name in weight_map.values():
        if not (isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.(safetensors|bin)", name)):
            raise UserError(
                f"{index} names the shard {name!r}, which is no weight file in its own folder. Download or save the "
                "model again."
            )
    return [index.parent / name for name in sorted(set(weight_map.values()))]
