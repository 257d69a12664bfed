"""Names that people type, and slips in them."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error's sentence that offers the nearest known name; empty if none is near."""
    known = list(known)
    longer = [name for name in known if name.startswith(word) or word.startswith(name)]
    near = longer or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'" if near else ""
