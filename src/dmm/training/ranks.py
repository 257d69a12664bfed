"""Which of a run's processes speaks for it; nothing heavy at import, so that a mistake is told without waiting."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from dmm.errors import UserError

_TELLING_SECONDS = 10.0  # at most: once the process that tells has ended, launchers end the others


def is_main_process() -> bool:
    """Whether this process speaks for the run; can be asked before the processes have found each other."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> NoReturn:
    """End a process that is not the one that tells, with what is wrong left for that to tell.

    Raises: SystemExit: a little later: a launcher kills all once the first has ended.
    """
    time.sleep(_TELLING_SECONDS)
    sys.exit(2)


@contextmanager
def told_once() -> Iterator[None]:
    """Within the block, in which all processes do the same, a :class:`UserError` is the main one's alone to tell."""
    try:
        yield
    except UserError:
        if not is_main_process():
            leave()
        raise
