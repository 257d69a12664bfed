"""What a user is told: the one exception that means that they can mend it, near names for slips, and notes."""

import difflib
import sys
from collections.abc import Iterable

_LONGEST = 2000  # characters: more is no sentence, but a value of somebody's file
_NOTED: set[str] = set()


class UserError(ValueError):
    """Bad input, told in one sentence: what, where, what was expected, what to do.

    The command line prints its text and exits with status 2; anything else that is raised is a
    defect of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """A text with what would break a line, or steer a terminal, made visible; and its middle left out if it is long.

    What is quoted in a sentence may come from a damaged file, and hold anything.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else " " if one.isspace() else ascii(one)[1:-1] for one in text)


def is_text(value: str) -> bool:
    """Whether a text can be written anywhere: half a character, which JSON and YAML can spell, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error's sentence that offers the nearest known name; empty if none is near."""
    known = list(known)
    longer = [name for name in known if name.startswith(word) or word.startswith(name)]
    near = longer or difflib.get_close_matches(word[:100], known, n=1)
    return f"; did you mean '{near[0]}'" if near else ""


def note_once(what: str, first: str) -> None:
    """Tell the user of something that may be as it should be, once in a process, whatever it is met in.

    Args:
        what: is noted.
        first: what it was met in.
    """
    if what not in _NOTED:
        _NOTED.add(what)
        print(f"dmm: note: {one_line(first)}: {what}", file=sys.stderr)
