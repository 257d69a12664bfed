"""Prompts in files, and what in a prompt is another tool's."""

import re
from pathlib import Path

from dmm.errors import UserError
from dmm.files.text import read_text


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines are skipped.

    Raises: UserError: there is no such file, it is no text, or it holds no prompt.
    """
    text = read_text(path, f"The file of prompts '{path}'")
    # not splitlines: a prompt may hold what else ends a line in Unicode, as text copied from a page does
    prompts = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if not prompts:
        raise UserError(f"The file of prompts '{path}' is empty; write one prompt a line.")
    return prompts
