"""Prompts in files, and what in a prompt is another tool's."""

import re
from collections.abc import Iterable
from pathlib import Path

from dmm.errors import UserError
from dmm.files.text import read_text

_WEB_UI = re.compile(
    r"\([^()]*:\s*[-+]?\d*\.?\d+\s*\)"  # (cat:1.2)
    r"|\({2,}[^()]+\){2,}"  # ((cat))
    r"|\[[^\[\]]*[:|][^\[\]]*\]"  # [cat:dog:0.5], [cat|dog]
    r"|<(?:lora|lyco|hypernet|embedding):[^<>]*>"
    r"|\bBREAK\b"
)


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


def web_ui_syntax(prompts: Iterable[str]) -> list[str]:
    """What in prompts says something to the web UIs of other tools, and is painted here as it stands; each once.

    Weights as in ``(cat:1.2)`` and ``((cat))``, words that come and go as in ``[cat:dog:0.5]``, ``<lora:ink:0.8>`` and
    ``BREAK``.
    """
    return list(dict.fromkeys(found[0] for prompt in prompts for found in _WEB_UI.finditer(prompt)))
