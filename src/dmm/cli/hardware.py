"""What devices there can be on this machine, told without torch, which takes seconds to say so."""

import ctypes
import os
import sys
from pathlib import Path

from dmm.errors import UserError


def check_device(name: str | None) -> None:
    """Refuse a device that this machine cannot have; whether torch finds it is seen later.

    Args:
        name: as ``--device`` takes it; None: none was named.
    Raises: UserError.
    """
    kind, _, index = (name or "cpu").partition(":")
    count = count_devices(kind)
    if count is not None and int(index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} of '{kind}'; choose another, or cpu.")


def count_devices(kind: str) -> int | None:
    """How many devices of a kind there are at most; None where only torch can say.

    Args:
        kind: ``cuda``, ``mps`` or ``cpu``. ROCm's devices are torch's ``cuda``, too.
    """
    if kind == "cpu":
        return 1
    if kind == "mps":
        return None if sys.platform == "darwin" else 0
    if sys.platform == "darwin":
        return 0
    if Path("/dev/kfd").exists() or os.environ.get("HIP_VISIBLE_DEVICES"):
        return None
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0 if sys.platform == "linux" else None
    number = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):
        return 0
    return number.value
