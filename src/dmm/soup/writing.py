"""Writing a safetensors file of known tensors, slice by slice in any order, from any thread."""

import errno
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

_STRETCH = 2**26  # bytes that are written to the cache before they are put on the disk itself
_BLOCK = 4096  # what goes past the cache begins and ends on multiples of it, in memory and in the file

_threads = threading.local()


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

    Where the system can, what is written goes to the disk past the system's cache: to copy gigabytes there that nobody
    reads yet costs half of a merge's CPU time. The rest, and all where it cannot, goes through the cache.

    Args:
        path: of the file, which is made, with the user's umask, and takes all its room on the disk at once.
        tensors: in the order in which they will lie; wider dtypes come first all the same, so that all are aligned.
    Raises: OSError: there is no room, or the place cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Declared], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        self._starts: dict[str, int] = {}
        self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
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
        self._direct = _open_past_cache(path)

    def room(self, name: str, start: int, stop: int) -> Tensor:
        """Memory to make elements of a tensor in, flat and in its dtype, from which they are written fastest.

        It is this thread's until it asks again.
        """
        dtype = self._dtypes[name]
        count = (stop - start) * dtype.itemsize
        memory: Tensor | None = getattr(_threads, "memory", None)
        if memory is None or len(memory) < count + _BLOCK:
            memory = _threads.memory = torch.empty(count + _BLOCK, dtype=torch.uint8)
        first = (self._place(name, start) - memory.data_ptr()) % _BLOCK
        return memory[first : first + count].view(dtype)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write elements of a tensor, flat and in its dtype, from the ``start``-th on.

        Raises: OSError: the disk does not take them.
        """
        at, data = self._place(name, start), as_bytes(values)
        # whole blocks go past the cache, what is before and after them does not
        first = min(-at % _BLOCK, len(data))
        last = max(first, len(data) - (at + len(data)) % _BLOCK)
        aligned = (values.data_ptr() - at) % _BLOCK == 0
        last = first + (self._write_past_cache(at + first, data[first:last]) if aligned else 0)
        self._write(at, data[:first])
        self._write(at + last, data[last:])
        with self._lock:
            self._unsynced += first + len(data) - last
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
        if self._direct is not None:
            os.close(self._direct)

    def _place(self, name: str, start: int) -> int:
        """Where in the file an element is."""
        return self._data + self._starts[name] + start * self._dtypes[name].itemsize

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

    def _write_past_cache(self, at: int, data: memoryview) -> int:
        """Write whole blocks, as far as the system takes them so.

        Returns: how many bytes it took; none where it does not do that at all.
        """
        done = 0
        try:
            while self._direct is not None and done < len(data):
                done += os.pwrite(self._direct, data[done:], at + done)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that wants it otherwise says so with that
                raise
        return done


def _open_past_cache(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:  # not on this file system
        return None


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
