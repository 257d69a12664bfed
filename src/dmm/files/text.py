"""Text files, read whole; what would be waited for without end, or is too large to be meant, is refused."""

import stat
from pathlib import Path

from dmm.errors import UserError

_LARGEST = 2**28  # bytes; what people write, and what says where gigabytes lie, is far smaller
_STREAMS = ("/dev/", "/proc/")  # where a shell puts what it pipes in, as in --prompts <(command)


def read_text(path: Path, told: str | None = None, *, largest: int = _LARGEST) -> str:
    """A UTF-8 text.

    Args:
        told: what errors call the file; by default its path.
        largest: bytes that it may have.
    Raises: UserError: it cannot be read, is no regular file, too large, or no UTF-8.
    """
    told = told or f"'{path}'"
    check_regular(path, told)
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{told} could not be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(data) > largest:
        raise UserError(f"{told} has more than {largest:,} bytes, which is too large for what it should be.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{told} is not UTF-8 text; save the file as UTF-8.") from error


def check_regular(path: Path, told: str | None = None) -> None:
    """Refuse a pipe, a socket or a device, which may keep its reader waiting for ever; what is not there passes.

    Raises: UserError: it is one.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or str(path).startswith(_STREAMS)):
        told = told or f"'{path}'"
        raise UserError(f"{told} is a pipe, a socket or a device, where a file was expected.")
