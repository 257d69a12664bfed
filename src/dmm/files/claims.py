"""One output, one writer: whoever is going to write to a place claims it first, and nobody else may meanwhile.

A claim is a lock on a file ``.NAME.lock`` beside the output, which the system takes from a process that ends, however
that ends: the file of a killed one is nobody's, and the next one takes it. It holds who has the lock, for people.
"""

import datetime
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dmm.errors import UserError
from dmm.files.outputs import sweep

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_WRITTEN_FROM = 1  # the first byte is what is locked, where a system keeps others from reading what is locked


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Within the block, ``output`` is this process's to write; what killed writers have left beside it is removed.

    Folders that are missing above it are made, and removed again if nothing came into them.

    Raises: UserError: another process is writing to it; with which, and since when.
    """
    place = Path(os.path.realpath(output.expanduser()))
    lock = place.with_name(f".{place.name}.lock")
    made = [folder for folder in place.parents if not folder.exists()]
    descriptor = _lock(lock, output)
    if descriptor is None:  # the place cannot be written, which its check tells better, or knows no locks
        yield
        return
    try:
        sweep(place)
        yield
    finally:
        with suppress(OSError):  # before it is let go, or it might be another's by then
            lock.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def check_unclaimed(output: Path) -> None:
    """Refuse an output that another process is writing to now; :func:`claimed` is what keeps it from beginning to.

    Raises: UserError: with which, and since when.
    """
    place = Path(os.path.realpath(output.expanduser()))
    try:
        descriptor = os.open(place.with_name(f".{place.name}.lock"), os.O_RDWR)
    except OSError:
        return
    try:
        if not _take(descriptor):
            raise _refusal(output, descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)


def _refusal(output: Path, descriptor: int) -> UserError:
    return UserError(
        f"'{output}' is being written by another process{_holder(descriptor)}. Wait for it, stop it, or name another "
        "output."
    )


def _lock(lock: Path, output: Path) -> int | None:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _take(descriptor):
                    raise _refusal(output, descriptor)
                if _is_same(descriptor, lock):  # or else its holder has removed it in between
                    _sign(descriptor)
                    return descriptor
            except (OSError, UserError):
                os.close(descriptor)
                raise
            os.close(descriptor)
    except OSError:
        return None


def _sign(descriptor: int) -> None:
    since = datetime.datetime.now().isoformat(" ", "seconds")
    told = f"process {os.getpid()} on {socket.gethostname()}, since {since}: dmm {' '.join(sys.argv[1:])[:300]}"
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, _WRITTEN_FROM, os.SEEK_SET)
    os.write(descriptor, told.encode(errors="replace"))


def _take(descriptor: int) -> bool:
    """Whether the lock is this process's now.

    Raises: OSError: there are no locks at the place.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Who has the lock, to follow "another process"; empty in the instant before they say."""
    os.lseek(descriptor, _WRITTEN_FROM, os.SEEK_SET)
    told = os.read(descriptor, 1000).decode(errors="replace").strip("\0")
    return f" ({told})" if told else ""
