"""What TIES trims by: the smallest magnitudes that are kept of tensors that are too large to sort.

A sample tells about where a threshold is; one reading of the tensor then counts what is above, and keeps the few
values near it, among which it is found exactly. Where a sample has misled, two readings find it by histograms.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm.soup.methods import kept_above, num_kept
from dmm.soup.plan import Merged
from dmm.soup.slices import pieces, slices, sums

_SMALL = 2**14  # elements of a tensor that is sorted as a whole
_SAMPLES = 32  # places of a tensor that a sample is taken from
_SAMPLE = 1024  # elements of each, in a large tensor
_MARGIN = 0.03  # how far the rank in the tensor may be from that in the sample
_INFINITE = 0x7F800000  # float32's bits

Progress = Callable[[int], object]


def thresholds(tensor: Merged, density: float, progress: Progress) -> Tensor:
    """The smallest magnitudes that TIES keeps of each of k models' differences from the base: (k,) float32, exact.

    Args:
        density: the share that is kept.
        progress: told of elements that are done with.
    """
    count = tensor.declared.num_elements
    if count <= _SMALL:
        whole = [bits.view(torch.float32) for bits in _magnitudes(tensor, 0, count)]
        progress(count)
        return torch.tensor([kept_above(magnitudes, density) for magnitudes in whole], dtype=torch.float32)
    rank = num_kept(density, count)
    # the order of non-negative numbers is that of their bits
    exact = _near_guess(tensor, rank, progress) or _by_histograms(tensor, rank)
    return torch.tensor(exact, dtype=torch.int32).view(torch.float32)


def _near_guess(tensor: Merged, rank: int, progress: Progress) -> list[int] | None:
    """The ``rank``-th largest magnitudes' bits, where they all are where a sample has them."""
    brackets, count = _guess(tensor, rank), tensor.declared.num_elements
    above, at_least, held = ([0] * len(brackets) for _ in range(3))
    between: list[list[Any]] = [[] for _ in brackets]
    for start, stop in slices(tensor):
        for i, (magnitudes, (low, high)) in enumerate(zip(_magnitudes(tensor, start, stop), brackets, strict=True)):
            bits: Any = magnitudes.numpy()  # which compares several times as fast
            at_least[i] += int(np.count_nonzero(bits >= low))
            above[i] += int(np.count_nonzero(bits >= high))
            between[i].append(bits[np.flatnonzero((bits > low) & (bits < high))])
            held[i] += len(between[i][-1])
        if max(held) > count // 4:  # of a sample that has misled, before they fill the memory
            progress(count - start)
            return None
        progress(stop - start)
    exact = []
    for i, (low, _) in enumerate(brackets):
        # many may be equal, as where nothing was trained: those at the lower end are only counted
        if above[i] < rank <= above[i] + held[i]:
            place = held[i] - (rank - above[i])
            exact.append(int(np.partition(np.concatenate(between[i]), place)[place]))
        elif above[i] + held[i] < rank <= at_least[i]:
            exact.append(low)
        else:
            return None
    return exact


def _guess(tensor: Merged, rank: int) -> list[tuple[int, int]]:
    """For each model, between what the ``rank``-th largest magnitude's bits should be: from, and below."""
    count = tensor.declared.num_elements
    length = min(_SAMPLE, count // _SAMPLES)
    places = [count // _SAMPLES * i for i in range(_SAMPLES)]
    sampled = [list(_magnitudes(tensor, place, place + length)) for place in places]
    brackets = []
    for parts in zip(*sampled, strict=True):
        bits = torch.cat(parts)
        few, many = (round((rank / count + far) * len(bits)) for far in (-_MARGIN, _MARGIN))
        low = 0 if many > len(bits) else int(bits.kthvalue(len(bits) - many + 1).values)
        high = _INFINITE if few < 1 else int(bits.kthvalue(len(bits) - few + 1).values) + 1
        brackets.append((low, high))
    return brackets


def _by_histograms(tensor: Merged, rank: int) -> list[int]:
    """The ``rank``-th largest magnitudes' bits: the upper half first, then the lower."""
    ranks = [rank] * len(tensor.models)
    bins = []
    for i, histogram in enumerate(_histograms(tensor, lambda _, halves: halves[1::2], 2**15)):
        place, above = _place(histogram, ranks[i])
        bins.append(place)
        ranks[i] -= above
    lower = _histograms(tensor, partial(_lower_halves, bins), 2**16)
    return [(bins[i] << 16) + _place(histogram, ranks[i])[0] for i, histogram in enumerate(lower)]


def _histograms(tensor: Merged, pick: Callable[[int, Tensor], Tensor], num_bins: int) -> list[Tensor]:
    """How often numbers occur among those that are picked of each model's magnitudes, (num_bins,) int64.

    Args:
        pick: given a model's index and its magnitudes' bits in halves, lower, upper, lower ...: int16, without a sign.
    """
    totals = [torch.zeros(num_bins, dtype=torch.int64) for _ in tensor.models]
    for start, stop in pieces(tensor):
        picked: list[list[Tensor]] = [[] for _ in tensor.models]
        for place in slices(tensor, start, stop):
            for i, bits in enumerate(_magnitudes(tensor, *place)):
                picked[i].append(pick(i, bits.view(torch.int16)))
        # a histogram takes as long as a slice does; a piece has many slices
        for total, numbers in zip(totals, picked, strict=True):
            total += torch.bincount(torch.cat(numbers).int() & 0xFFFF, minlength=num_bins)
    return totals


def _lower_halves(bins: Sequence[int], i: int, halves: Tensor) -> Tensor:
    return halves[::2][halves[1::2] == bins[i]]


def _place(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that the ``rank``-th largest is in, and how many are in those above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    return len(histogram) - 1 - place, int(from_top[place] - histogram.flip(0)[place])


def _magnitudes(tensor: Merged, start: int, stop: int) -> Iterator[Tensor]:
    """Each model's difference from the base without its sign, as the bits of a float32."""
    assert tensor.base is not None
    base = tensor.base.read(start, stop, sums(tensor))
    for source in tensor.models:
        yield source.read(start, stop, sums(tensor)).sub_(base).abs_().float().view(torch.int32)
