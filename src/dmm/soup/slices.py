"""How tensors are cut to be read, computed and written: by their length and the number of models alone."""

from collections.abc import Iterator

import torch

from dmm.soup.applying import accumulator
from dmm.soup.plan import Merged

PIECE = 2**20
"""Elements that are written at a time: fewer cost more of the system's time."""

SLICE = 2**18
"""Elements that are computed at a time: fewer cost more calls, more leave a core's own cache."""

ALIGNMENT = 1024
"""Elements; the random masks are made in eights."""

_SLICE_BYTES = 2**24  # of all models together


def pieces(tensor: Merged) -> Iterator[tuple[int, int]]:
    """What of a tensor is written at a time: first element, and the one behind the last."""
    return _cut(0, tensor.declared.num_elements, PIECE)


def slices(tensor: Merged, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """How a tensor, or a piece of it, is computed."""
    # as many as are held at once in float64; the methods hold some of their own beside
    by_models = _SLICE_BYTES // (8 * (len(tensor.models) + 6)) // ALIGNMENT * ALIGNMENT
    return _cut(start, tensor.declared.num_elements if stop is None else stop, max(ALIGNMENT, min(SLICE, by_models)))


def sums(tensor: Merged) -> torch.dtype:
    """The dtype that a tensor's sums are made in."""
    sources = [*tensor.models, *(source for source in (tensor.base, tensor.origin) if source is not None)]
    return accumulator([source.dtype for source in sources])


def _cut(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, length):
        yield first, min(stop, first + length)
