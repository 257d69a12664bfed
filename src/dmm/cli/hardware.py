"""What devices there can be on this machine, told without torch, which takes seconds to say so."""

import ctypes
import os
import sys
from pathlib import Path


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
