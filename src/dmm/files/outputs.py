"""Outputs appear whole or not at all, and never over what is already there unless that is asked for.

Work goes into a temporary neighbour of the output and is moved into place at the end, so that an
interrupted run leaves nothing behind and a replaced file is the old one until it is the new one.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dmm.errors import UserError

# what the place of the output can be blamed for; any other OSError is not about writing
_PLACE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
}


def check_file(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that could not be written at the end; call it before any expensive work.

    Raises: UserError: the file exists and may not be overwritten, is a folder, or its folder cannot be written.
    """
    with _told_to_user(path):
        if path.is_dir():
            raise UserError(f"'{path}' is a folder; name a file for the output.")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"'{path}' exists. Name another output, or add --overwrite to replace it.")
        _check_parent(path)


def check_folder(path: Path, *, overwrite: bool = False, besides: str | None = None) -> None:
    """Refuse a folder that could not be filled at the end; call it before any expensive work.

    Args:
        besides: a name in it that does not count.
    Raises: UserError: the folder holds something and may not be overwritten, is a file, or cannot be written.
    """
    with _told_to_user(path):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"'{path}' is a file; name a folder for the output.")
        if not path.is_dir():
            _check_parent(path)
        elif not os.access(path, os.W_OK):
            raise UserError(f"The folder '{path}' cannot be written; name another output.")
        elif not overwrite and any(inside.name != besides for inside in path.iterdir()):
            raise UserError(
                f"The folder '{path}' is not empty. Name another output, "
                "or add --overwrite to replace files of the same name."
            )


def check_disk(path: Path, num_bytes: int, purpose: str, remedy: str) -> None:
    """Refuse a disk that what will be written does not fit on; call it before any expensive work.

    Args:
        path: of a file or folder, that need not be there.
        num_bytes: still to be written.
        purpose: what for.
        remedy: what to do instead of making room.
    Raises: UserError: the disk has less free.
    """
    place = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise UserError(
            f"'{path}' needs {num_bytes / 1e9:.3g} GB for {purpose}, and its disk has {free / 1e9:.3g} GB free. Make "
            f"room, {remedy}."
        )


def held_bytes(folder: Path) -> int:
    """What all files in a folder take; the folder need not be there, nor stay any file that another process removes."""
    held = 0
    for file in folder.rglob("*") if folder.is_dir() else ():
        with suppress(FileNotFoundError):
            held += file.stat().st_size if file.is_file() else 0
    return held


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write to, which becomes ``path`` when the block ends well and vanishes when it does not.

    Missing parent folders are made.

    Raises: UserError: see :func:`check_file`; or writing failed, as when the disk is full.
    """
    check_file(path, overwrite=overwrite)
    temporary = _neighbour(path)
    with _told_to_user(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            check_file(path, overwrite=overwrite)  # it may have appeared while we worked
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``path`` when the block ends well and vanishes when it does not.

    With ``overwrite``, files of the same name are replaced and all others in ``path`` stay. The modes of files are what
    the umask says, whatever those were that the block made or copied.

    Raises: UserError: see :func:`check_folder`; or writing failed, as when the disk is full.
    """
    check_folder(path, overwrite=overwrite)
    temporary = _neighbour(path)
    with _told_to_user(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _give_usual_modes(temporary)
            check_folder(path, overwrite=overwrite)  # it may have been filled while we worked
            if not path.exists():
                temporary.rename(path)
            else:
                for file in sorted(file for file in temporary.rglob("*") if file.is_file()):
                    target = path / file.relative_to(temporary)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _neighbour(path: Path) -> Path:
    # made by hand: tempfile's are readable by their owner only, and would stay so once in place
    absolute = path.resolve()
    return absolute.with_name(f".{absolute.name}.{secrets.token_hex(4)}.tmp")


def _give_usual_modes(folder: Path) -> None:
    """Give the files in a folder the mode that those get which are made there: libraries make some for their owner."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _check_parent(path: Path) -> None:
    parent = next(folder for folder in path.resolve().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"'{path}' cannot be written: '{parent}' is not a folder.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"'{path}' cannot be written: the folder '{parent}' is not writable. Name another output.")


@contextmanager
def _told_to_user(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _PLACE:
            raise
        raise UserError(f"'{path}' could not be written: {error.strerror or error}.") from error
