"""Making a planned soup in slices: every slice of the output on its own, in any order, by several threads.

What a slice holds depends on nothing but the inputs and the plan: sums run over the models in the plan's order, and
slices are cut alike whatever the number of threads, so that the results are the same for any.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmm.soup.methods import gram_matrix, kept_above, num_kept
from dmm.soup.plan import Merged, Plan
from dmm.soup.reading import num_not_finite
from dmm.soup.registry import Slice, accumulator
from dmm.soup.writing import NewWeightFile

MAX_THREADS = 8
"""More make a merge no faster, and each has slices of its own in memory."""

_PIECE = 2**20  # elements that are written at a time: fewer cost more of the system's time
_SLICE = 2**18  # elements that are computed at a time: fewer cost more calls, more leave a core's own cache
_SLICE_BYTES = 2**24  # of all models together
_SMALL = 2**14  # elements of a tensor that is sorted rather than counted
_ALIGNMENT = 1024  # elements; the random masks are made in eights

Progress = Callable[[int], object]
"""Told of elements that are done with."""


def num_threads(asked: int | None = None, *, light: bool = False) -> int:
    """How many threads work, to a limit: as many as asked for, or as there are cores for this process.

    Args:
        light: the work is no longer than reading and writing are: on half as many, cores wait less for memory and for
            each other, which saves a quarter of their time and costs little of the user's.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked or (max(1, cores // 2) if light else cores), MAX_THREADS)


def in_threads(tasks: Iterable[Callable[[], Any]], threads: int) -> list[Any]:
    """Run tasks, the first error ending them all.

    Returns: their results, in their order.
    """
    with (
        _single_threaded_torch(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        futures = [pool.submit(task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures if future.done()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def measure(plan: Plan, threads: int, progress: Progress) -> dict[str, Tensor]:
    """What the method measures of whole tensors, by their names; nothing for a method that measures nothing."""
    if plan.method.measures is None:
        return {}
    gauge = _gram if plan.method.measures == "gram" else _thresholds

    merged = [tensor for tensor in plan.tensors if not tensor.copied and tensor.constant is None]
    results = in_threads([partial(gauge, plan, tensor, progress) for tensor in merged], threads)
    return {tensor.name: result for tensor, result in zip(merged, results, strict=True)}


def write(
    plan: Plan,
    files: Mapping[str, tuple[NewWeightFile, str]],
    measured: Mapping[str, Tensor],
    threads: int,
    progress: Progress,
) -> dict[str, int]:
    """Merge, and write every tensor.

    Args:
        files: for each tensor's name the file that it goes to and its name there.
        measured: from :func:`measure`.
    Returns: how many values of which tensors came out NaN or infinite.
    Raises: OSError: a file does not take what is written.
    """
    broken: Counter[str] = Counter()
    lock = threading.Lock()

    def task(tensor: Merged, start: int, stop: int) -> Callable[[], None]:
        def run() -> None:
            file, name = files[tensor.name]
            piece = file.room(name, start, stop)
            found = 0
            for first, last in _slices(tensor, start, stop):
                values = piece[first - start : last - start]
                values.copy_(_merge(plan, tensor, first, last, measured.get(tensor.name)))
                found += num_not_finite(values)
            file.write(name, start, piece)
            with lock:
                broken[tensor.name] += found
                progress(stop - start)

        return run

    in_threads((task(tensor, *piece) for tensor in plan.tensors for piece in _pieces(tensor)), threads)
    return {tensor.name: broken[tensor.name] for tensor in plan.tensors if broken[tensor.name]}


def _merge(plan: Plan, tensor: Merged, start: int, stop: int, measured: Tensor | None) -> Tensor:
    """One slice of one tensor, in the dtype that the sums are made in."""
    dtype = tensor.declared.dtype
    if tensor.constant is not None:
        return tensor.constant[start:stop]
    if tensor.copied:
        source = tensor.models[0]
        return (
            source.read(start, stop, dtype) if dtype.is_floating_point else source.file.read(source.name, start, stop)
        )
    sums = _sums(tensor)
    one = Slice(
        models=[source.read(start, stop, sums) for source in tensor.models],
        weights=tensor.weights,
        base=None if tensor.base is None else tensor.base.read(start, stop, sums),
        origin=None if tensor.origin is None else tensor.origin.read(start, stop, sums),
        measured=measured,
        start=start,
        keys=tensor.keys,
        density=plan.density,
        scale=plan.recipe.scale,
    )
    return plan.method.apply(one)


def _gram(plan: Plan, tensor: Merged, progress: Progress) -> Tensor:
    """The scalar products of the models, or of their differences where the method has a base."""
    gram = torch.zeros(len(tensor.models), len(tensor.models), dtype=torch.float64)
    for start, stop in _slices(tensor):
        models = [source.read(start, stop, torch.float64) for source in tensor.models]
        if tensor.base is not None:
            base = tensor.base.read(start, stop, torch.float64)
            models = [model - base for model in models]
        gram += gram_matrix(models)
        progress(stop - start)
    return gram


def _thresholds(plan: Plan, tensor: Merged, progress: Progress) -> Tensor:
    """The smallest magnitudes that TIES keeps, (k,): found exactly, in two readings, from histograms of their bits."""
    count = tensor.declared.num_elements
    if count <= _SMALL:
        whole = [bits.view(torch.float32) for bits in _magnitudes(tensor, 0, count)]
        progress(count)
        return torch.tensor([kept_above(magnitudes, plan.density) for magnitudes in whole], dtype=torch.float32)
    ranks = [num_kept(plan.density, count)] * len(tensor.models)
    # the order of non-negative numbers is that of their bits: the upper half first, then the lower
    upper = _histograms(tensor, lambda _, halves: halves[1::2], 2**15, lambda n: progress(n // 2))
    bins = []
    for i, histogram in enumerate(upper):
        place, above = _place(histogram, ranks[i])
        bins.append(place)
        ranks[i] -= above
    in_bins = partial(_lower_halves, bins)
    lower = _histograms(tensor, in_bins, 2**16, lambda n: progress(n - n // 2))
    exact = [(bins[i] << 16) + _place(histogram, ranks[i])[0] for i, histogram in enumerate(lower)]
    return torch.tensor(exact, dtype=torch.int32).view(torch.float32)


def _histograms(
    tensor: Merged, pick: Callable[[int, Tensor], Tensor], num_bins: int, progress: Progress
) -> list[Tensor]:
    """How often numbers occur among those that are picked of each model's magnitudes, (num_bins,) int64.

    Args:
        pick: given a model's index and its magnitudes' bits in halves, lower, upper, lower ...: int16, without a sign.
    """
    totals = [torch.zeros(num_bins, dtype=torch.int64) for _ in tensor.models]
    for start, stop in _pieces(tensor):
        picked: list[list[Tensor]] = [[] for _ in tensor.models]
        for place in _slices(tensor, start, stop):
            for i, bits in enumerate(_magnitudes(tensor, *place)):
                picked[i].append(pick(i, bits.view(torch.int16)))
        # a histogram takes as long as a slice does; a piece has many slices
        for total, numbers in zip(totals, picked, strict=True):
            total += torch.bincount(torch.cat(numbers).int() & 0xFFFF, minlength=num_bins)
        progress(stop - start)
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
    sums = _sums(tensor)
    assert tensor.base is not None
    base = tensor.base.read(start, stop, sums)
    for source in tensor.models:
        yield source.read(start, stop, sums).sub_(base).abs_().float().view(torch.int32)


def _pieces(tensor: Merged) -> Iterator[tuple[int, int]]:
    """What of a tensor is written at a time."""
    return _cut(0, tensor.declared.num_elements, _PIECE)


def _slices(tensor: Merged, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """How a tensor, or a piece of it, is computed: in slices that its place and the number of models alone decide."""
    # as many as are held at once in float64; the methods hold some of their own beside
    by_models = _SLICE_BYTES // (8 * (len(tensor.models) + 6)) // _ALIGNMENT * _ALIGNMENT
    return _cut(start, tensor.declared.num_elements if stop is None else stop, max(_ALIGNMENT, min(_SLICE, by_models)))


def _cut(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, length):
        yield first, min(stop, first + length)


def _sums(tensor: Merged) -> torch.dtype:
    sources = [*tensor.models, *(source for source in (tensor.base, tensor.origin) if source is not None)]
    return accumulator([source.dtype for source in sources])


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """The slices are what runs in parallel; each is computed by one thread."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
