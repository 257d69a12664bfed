"""Putting a new folder in the place of an old one, so that at no time the place holds some of each.

Where the system can exchange two names (``renameat2`` with ``RENAME_EXCHANGE``: Linux, on most of its file systems),
that is one step. Elsewhere the old folder is renamed to ``.NAME.XXXXXXXX.old``, then the new one to ``NAME``: a process
that is killed in the instant between leaves no ``NAME``, and the next writer puts the old one back with :func:`mend`.
"""

import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP)


def swap_in(new: Path, place: Path) -> None:
    """Put a folder in the place of another, which is removed.

    Args:
        new: beside ``place``, of a name that ends in eight letters and ``.tmp``.
        place: of the old folder.
    Raises: OSError: it cannot be renamed; ``place`` is as it was.
    """
    if not _exchange(new, place):
        old = new.with_suffix(".old")
        place.rename(old)
        try:
            new.rename(place)
        except OSError:
            old.rename(place)
            raise
        new = old
    shutil.rmtree(new, ignore_errors=True)


def mend(place: Path) -> None:
    """Put a folder back that :func:`swap_in` was killed before it had replaced, and remove one that it had."""
    for old in sorted(place.parent.glob(f".{glob_safe(place.name)}.????????.old")):
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(place)


def glob_safe(name: str) -> str:
    """A name as a pattern that is for nothing else."""
    return "".join(f"[{one}]" if one in "*?[" else one for one in name)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))
