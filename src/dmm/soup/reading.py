"""Reading weight files by position, in slices, never mapped: a mapped file that shrinks kills the process."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.files.outputs import new_file
from dmm.formats.quantised import unpack
from dmm.formats.tensors import read_header
from dmm.soup.writing import as_bytes

CHUNK = 2**21
"""Bytes that are read at a time where a whole file is read."""

# a number is infinite or none where all bits of its exponent are set; e4m3fn has one NaN, of all bits, and no infinity
_EXPONENTS = {
    torch.float8_e4m3fn: (np.int8, 0x7F),
    torch.float8_e5m2: (np.int8, 0x7C),
    torch.float16: (np.int16, 0x7C00),
    torch.bfloat16: (np.int16, 0x7F80),
    torch.float32: (np.int32, 0x7F800000),
    torch.float64: (np.int64, 0x7FF0000000000000),
}

_threads = threading.local()


class WeightFile:
    """A safetensors file, its header checked, open for reading.

    Args:
        path: of the file.
    Raises: UserError: see :func:`dmm.formats.tensors.read_header`; no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path = path
        self.tensors = header.tensors
        self._stored, self._scales = header.stored, header.scales
        self.metadata = header.metadata
        self._offsets = header.offsets
        self._descriptor = os.open(path, os.O_RDONLY)
        self._identity = self._identify()

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def read(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Read some of a tensor's elements, flattened.

        Args:
            dtype: of what is returned, by default the file's.
        Raises: UserError: the file ends before them: it was changed.
        """
        kept = self._stored[name].dtype
        at, count = self._offsets[name][0] + start * kept.itemsize, (stop - start) * kept.itemsize
        if name in self._scales:
            stored = self._read(at, _scratch(count)).view(kept)
            return unpack(stored, self._scale(name), self._rows(name, start, stop)).to(dtype or torch.float32)
        if dtype in (None, kept):
            return self._read(at, torch.empty(count, dtype=torch.uint8)).view(kept)
        # what is converted is another tensor: this thread's reads of this kind share a place
        return self._read(at, _scratch(count)).view(kept).to(dtype)

    def in_order(self) -> list[str]:
        """The tensors' names, as they lie in the file."""
        return sorted(self.tensors, key=self._offsets.__getitem__)

    def _scale(self, name: str) -> Tensor:
        scale = self._stored[self._scales[name]]
        at = self._offsets[self._scales[name]][0]
        return self._read(at, torch.empty(scale.nbytes, dtype=torch.uint8)).view(scale.dtype)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Which output each of some elements is of."""
        return torch.arange(start, stop) // self._stored[name][0].numel()

    def check_unchanged(self) -> None:
        """Check that the file is still the one that was opened.

        Raises: UserError: it was written to.
        """
        if self._identify() != self._identity:
            raise UserError(f"{self.path} was changed while it was read. Let whatever writes it end, and start again.")

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self._identity[0]

    def digest(self, cache: "Digests", progress: Callable[[int], object] = lambda _: None) -> str:
        """The file's sha256, all its values being finite: both are seen in one reading, or known from an earlier one.

        Args:
            cache: of what is known.
            progress: told of bytes that are done with.
        Raises: UserError: naming the first tensor that holds NaN or infinity.
        """
        known = cache.get(self.path, self._identity)
        if known is not None:
            progress(self.num_bytes)
            return known
        digest = hashlib.sha256()
        names = sorted(self._stored, key=self._offsets.__getitem__)  # of all that is in the file
        beginning = self._offsets[names[0]][0] if names else os.fstat(self._descriptor).st_size
        digest.update(as_bytes(self._read(0, _scratch(beginning))))
        progress(beginning)
        for name in names:
            first, last = self._offsets[name]
            for at in range(first, last, CHUNK):
                chunk = self._read(at, _scratch(min(CHUNK, last - at)))
                digest.update(as_bytes(chunk))
                progress(len(chunk))
                # a chunk's length is a multiple of every dtype's, so that none cuts a number
                if num_not_finite(chunk.view(self._stored[name].dtype)):
                    raise UserError(
                        f"{self.path}: '{name}' holds values that are NaN or infinite in {self._stored[name].dtype}. "
                        "The file is damaged, or was saved in a dtype too small for it; get another copy."
                    )
        self.check_unchanged()
        cache.add(self.path, self._identity, digest.hexdigest())
        return digest.hexdigest()

    def _read(self, at: int, buffer: Tensor) -> Tensor:
        """Fill a buffer from a place in the file on, and return it."""
        view = as_bytes(buffer)
        done = 0
        while done < len(view):
            got = os.preadv(self._descriptor, [view[done:]], at + done)
            if not got:
                raise UserError(f"{self.path} became shorter while it was read. Let whatever writes it end first.")
            done += got
        return buffer

    def _identify(self) -> tuple[int, int]:
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns


def _scratch(count: int) -> Tensor:
    """Bytes that are this thread's until it asks again: to get fresh ones from the system takes longer than a read."""
    buffer: Tensor | None = getattr(_threads, "buffer", None)
    if buffer is None or len(buffer) < count:
        buffer = _threads.buffer = torch.empty(max(count, CHUNK), dtype=torch.uint8)
    return buffer[:count]


def num_not_finite(tensor: Tensor) -> int:
    """How many of a flat tensor's values are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    if tensor.dtype not in _EXPONENTS:  # other eight-bit ones
        return int((~tensor.float().isfinite()).sum())
    kind, exponent = _EXPONENTS[tensor.dtype]
    # by the bits, which is far cheaper than converting gigabytes: they have the order of the magnitudes, so that the
    # largest, with a sign and without one, are those of the largest positive and the largest negative number
    bits = tensor.view(torch.uint8).numpy().view(kind)
    unsigned = bits.view(f"u{bits.itemsize}")
    sign = 1 << 8 * bits.itemsize - 1
    if bits.max(initial=0) < exponent and unsigned.max(initial=0) < sign + exponent:
        return 0
    return int(np.count_nonzero(bits & kind(exponent) == exponent))


class Digests:
    """The sha256 of files that were read whole before and had finite values only, by path, size and time.

    Args:
        path: where they are kept between runs; by default in the user's cache.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or platformdirs.user_cache_path("dmm") / "digests.json"
        self._known = dict(self._load())
        self._added = False

    def get(self, path: Path, identity: tuple[int, int]) -> str | None:
        """What is known of a file of this size and modification time."""
        known = self._known.get(str(path.resolve()))
        return str(known[2]) if known and (known[0], known[1]) == identity else None

    def add(self, path: Path, identity: tuple[int, int], digest: str) -> None:
        """Note a file's digest."""
        self._known[str(path.resolve())] = [*identity, digest]
        self._added = True

    def save(self) -> None:
        """Keep what was added, if the cache can be written: all can be computed again."""
        if not self._added:
            return
        try:
            with new_file(self._path, overwrite=True) as temporary:
                temporary.write_text(json.dumps({**dict(self._load()), **self._known}), encoding="utf-8")
        except (UserError, OSError):
            return

    def _load(self) -> Iterator[tuple[str, list[int | str]]]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        for path, entry in found.items() if isinstance(found, Mapping) else ():
            if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], str):
                yield path, entry
