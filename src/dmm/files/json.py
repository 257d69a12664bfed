"""JSON on disk and in metadata: whatever is wrong with it is told in a sentence."""

import json
from pathlib import Path
from typing import Any

from dmm.errors import UserError, is_text
from dmm.files.text import read_text

_DEEPEST = 100
"""Levels of objects and lists; configs have a handful, and libraries follow them by recursion."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: UserError: missing, or not a JSON object; or nested too deeply.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, but a stock pipeline folder has one.")
    value = parse_json(read_text(path, str(path)), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where a JSON object was expected.")
    return value


def parse_json(text: str | bytes, told: str) -> Any:
    """The value of a JSON text.

    Args:
        told: what errors call it, as their first words.
    Raises: UserError: it is no JSON, or nested too deeply.
    """
    too_deep = UserError(f"{told} is nested more than {_DEEPEST} levels deep, as no file of its kind is.")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise UserError(f"{told} is not valid JSON: {error}.") from error
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _within(outer)]
        if not level:
            break
    else:
        raise too_deep
    if not is_text(json.dumps(value, ensure_ascii=False)):
        raise UserError(f"{told} is not valid JSON: it spells half a character, a surrogate by itself.")
    return value


def _within(value: Any) -> list[Any]:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for one in held if isinstance(one, dict | list)]
