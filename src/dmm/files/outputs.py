"""Outputs appear whole or not at all, and never over what is already there unless that is asked for.

Work goes into a temporary neighbour of the output and is moved into place at the end, so that an
interrupted run leaves nothing behind and what is replaced, file or folder, is the old one until it is the new one.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dmm.errors import UserError
from dmm.files.sizes import told_bytes
from dmm.files.swap import glob_safe, mend, swap_in

# what the place of the output can be blamed for; any other OSError is not about writing
_PLACE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EBUSY, errno.EXDEV),  # a folder that a file system is mounted at can be no other's
}
_LONGEST_NAME = 255  # bytes, of all file systems in use
_LONGEST_ADDED = len(".") + len(".12345678.tmp")


def check_file(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a file that could not be written at the end; call it before any expensive work.

    Raises: UserError: the file exists and may not be overwritten, is a folder, or its folder cannot be written.
    """
    with _told_to_user(path):
        if path.is_dir():
            raise UserError(f"'{path}' is a folder; name a file for the output.")
        if os.path.lexists(path) and not overwrite:
            raise UserError(f"'{path}' exists. Name another output, or add --overwrite to replace it.")
        _check_name(path)
        _check_parent(path)


def check_folder(path: Path, *, overwrite: bool = False, besides: str | None = None) -> None:
    """Refuse a folder that could not be filled at the end; call it before any expensive work.

    Args:
        besides: a name in it that does not count.
    Raises: UserError: the folder holds something and may not be overwritten, is a file, or cannot be written.
    """
    with _told_to_user(path):
        mend(_real(path))
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"'{path}' is a file; name a folder for the output.")
        _check_name(path)
        if not path.is_dir():
            _check_parent(path)
        elif not os.access(path, os.W_OK):
            raise UserError(f"The folder '{path}' cannot be written; name another output.")
        elif not overwrite and any(inside.name != besides for inside in path.iterdir()):
            raise UserError(
                f"The folder '{path}' is not empty. Name another output, "
                "or add --overwrite to replace what is of the same name."
            )


def check_new_folder(path: Path, *, overwrite: bool = False) -> None:
    """:func:`check_folder` of one that :func:`new_folder` will put in place whole.

    Raises: UserError: also where no folder can take another's place: it is where this process runs, or where a file
        system is mounted, or the folder around it cannot be written.
    """
    check_folder(path, overwrite=overwrite)
    with _told_to_user(path):
        place = _real(path)
        if place == Path.cwd():
            raise UserError(
                f"'{path}' is where this command runs, and so cannot be replaced whole: name a folder in it."
            )
        if os.path.ismount(place):
            raise UserError(
                f"'{path}' is where a disk is mounted, and so cannot be replaced whole: name a folder in it."
            )
        _check_parent(path)


def check_disk(path: Path, num_bytes: int, purpose: str, remedy: str) -> None:
    """Refuse a disk that what will be written does not fit on; call it before any expensive work.

    Args:
        path: of a file or folder, that need not be there.
        num_bytes: still to be written.
        purpose: what for.
        remedy: what to do instead of making room.
    Raises: UserError: the disk has less free.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if num_bytes > free:
        raise UserError(
            f"'{path}' needs {told_bytes(num_bytes)} for {purpose}, and its disk has {told_bytes(free)} free. Make "
            f"room, {remedy}."
        )


def existing_parent(path: Path) -> Path:
    """What of a path is there already: itself, or the nearest folder around it."""
    return next(folder for folder in (_real(path), *_real(path).parents) if folder.exists())


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
    temporary = _neighbour(_real(path.parent) / path.name)  # beside a link, not beside what it leads to
    with _told_to_user(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            check_file(path, overwrite=overwrite)  # it may have appeared while we worked
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False, parts: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``path`` when the block ends well and vanishes when it does not.

    With ``overwrite`` it takes the place of the one that is there in one step: at no time ``path`` holds some of each.
    What is in the old one under names that the new one does not have stays, but for ``parts``. The modes of new files
    are what the umask says, whatever those were that the block made or copied.

    Args:
        parts: names in the old one that belong to what is replaced, and go with it.
    Raises: UserError: see :func:`check_new_folder`; or writing failed, as when the disk is full.
    """
    check_new_folder(path, overwrite=overwrite)
    place = _real(path)
    temporary = _neighbour(place)
    with _told_to_user(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _give_usual_modes(temporary)
            check_new_folder(path, overwrite=overwrite)  # it may have been filled while we worked
            if not path.exists() or not any(path.iterdir()):
                temporary.rename(place)
            else:
                _keep_rest(place, temporary, parts)
                swap_in(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, whose files join those in ``folder`` when the block ends well.

    Each replaces one of its name, whole; they are no whole together, as pictures are none.

    Raises: UserError: see :func:`check_folder`; or writing failed, as when the disk is full.
    """
    check_folder(folder, overwrite=overwrite)
    temporary = _neighbour(_real(folder))
    with _told_to_user(folder):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            check_folder(folder, overwrite=overwrite)  # it may have been filled while we worked
            if not folder.exists():
                temporary.rename(_real(folder))
            else:
                for file in sorted(temporary.iterdir()):
                    file.replace(folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove what writers of ``path`` that were killed have left beside it; nobody else may be writing to it."""
    for temporary in path.parent.glob(f".{glob_safe(path.name)}.????????.tmp"):
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _give_usual_modes(folder: Path) -> None:
    """Give the files in a folder the mode that those get which are made there: libraries make some for their owner."""
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _keep_rest(old: Path, new: Path, parts: Collection[str]) -> None:
    """Let a new folder hold, too, what it has no name for in the old one; it takes no room on the disk."""
    for kept in old.iterdir():
        if kept.name in parts or os.path.lexists(new / kept.name):
            continue
        if kept.is_dir() and not kept.is_symlink():
            shutil.copytree(kept, new / kept.name, symlinks=True, copy_function=_link)
        else:
            _link(kept, new / kept.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # not on this file system
        shutil.copy2(source, target, follow_symlinks=False)


def _real(path: Path) -> Path:
    # Path.resolve raises another error where links lead in a circle
    return Path(os.path.realpath(path))


def _neighbour(place: Path) -> Path:
    # made by hand: tempfile's are readable by their owner only, and would stay so once in place
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")


def _check_name(path: Path) -> None:
    name = _real(path).name
    too_long = len(os.fsencode(name)) + _LONGEST_ADDED - _LONGEST_NAME
    if too_long > 0:
        raise UserError(
            f"The name of '{path}' is {too_long} bytes too long: what is written gets it once it is whole, and needs "
            f"{_LONGEST_ADDED} more until then. Name a shorter output."
        )


def _check_parent(path: Path) -> None:
    parent = next(folder for folder in _real(path).parents if os.path.lexists(folder))
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
