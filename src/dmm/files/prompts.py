"""Prompts in files."""

from pathlib import Path

from dmm.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines are skipped.

    Raises: UserError: there is no such file, it is no text, or it holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"The prompts '{path}' could not be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The prompts '{path}' are not UTF-8 text; save the file as UTF-8.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"The file of prompts '{path}' is empty; write one prompt a line.")
    return prompts
