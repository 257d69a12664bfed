"""What a user is told: the one exception that means that they can mend it, and near names for slips in theirs."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one sentence: what, where, what was expected, what to do.

    The command line prints its text and exits with status 2; anything else that is raised is a
    defect of ours and keeps its traceback.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error's sentence that offers the nearest known name; empty if none is near."""
    known = list(known)
    longer = [name for name in known if name.startswith(word) or word.startswith(name)]
    near = longer or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'" if near else ""
