"""JSON objects on disk."""

import json
from pathlib import Path
from typing import Any

from dmm.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: UserError: missing, or not a JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, but a stock pipeline folder has one.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where a JSON object was expected.")
    return value
