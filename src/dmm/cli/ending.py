"""How a command ends early: what it has begun is cleared away, and what the system refuses is told in a sentence."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""The exit status that shells know."""

# what the machine, or the state that its files are in, can be blamed for; any other OSError is a defect of ours
_OF_THE_SYSTEM = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENXIO),
}


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Within the block SIGTERM ends work as an interrupt does, with all that clears up after it.

    Where a launcher has started several processes it ends them as ever: one that waits for another in a collective
    would not hear of it.

    Returns: what a signal that came is put into.
    """
    came: list[int] = []

    def interrupt(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # or a second one would interrupt the clearing up
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield came
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def told_of_system(error: OSError) -> str | None:
    """What the system refused, as a sentence; None where that is no fault of the system's."""
    if error.errno not in _OF_THE_SYSTEM:
        return None
    reason = error.strerror or str(error)
    return f"'{os.fsdecode(error.filename)}': {reason}." if error.filename else f"the system refused: {reason}."
