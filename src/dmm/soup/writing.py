"""Writing a safetensors file of known tensors, slice by slice in any order, from any thread."""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.formats.tensors import DTYPE_NAMES

_STRETCH = 2**26  # bytes that are written before they are put on the disk itself


@dataclass(frozen=True)
class Declared:
    """A tensor that a file will hold."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """How many."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """How many."""
        return self.num_elements * self.dtype.itemsize


class NewWeightFile:
    """A safetensors file to be filled. The same tensors and metadata make the same bytes.

    Args:
        path: of the file, which is made, with the user's umask, and takes all its room on the disk at once.
        tensors: in the order in which they will lie; wider dtypes come first all the same, so that all are aligned.
    Raises: OSError: there is no room, or the place cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Declared], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        self._starts: dict[str, int] = {}
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            self._starts[name] = end
            end += tensor.num_bytes
            span = [self._starts[name], end]
            header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._data = 8 + len(text)
        self._lock, self._unsynced = threading.Lock(), 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, self._data + end)
            self._write(0, memoryview(len(text).to_bytes(8, "little") + text))
        except OSError:
            os.close(self._descriptor)
            raise

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write elements of a tensor, flat and in its dtype, from the ``start``-th on.

        Raises: OSError: the disk does not take them.
        """
        at = self._data + self._starts[name] + start * values.dtype.itemsize
        data = as_bytes(values)
        self._write(at, data)
        with self._lock:
            self._unsynced += len(data)
            if self._unsynced < _STRETCH:
                return
            self._unsynced = 0
        self._settle()

    def sync(self) -> None:
        """Put all that was written on the disk itself.

        Raises: OSError: it did not get there.
        """
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def _settle(self) -> None:
        """Put what was written so far on the disk, and give its memory back at once.

        The system need not find gigabytes for a file that nobody reads yet, nor drop others from its cache for them.
        """
        self.sync()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write(self, at: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], at + done)


def as_bytes(flat: Tensor) -> memoryview:
    """A flat tensor's own memory."""
    array: Any = flat.contiguous().view(torch.uint8).numpy()  # numpy's types do not say that it is a buffer
    return memoryview(array)


def sync_folder(path: Path) -> None:
    """Put a folder's own entries on the disk: that a file was renamed is kept there, not in the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
