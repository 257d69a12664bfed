"""Making a planned soup in slices: every slice of the output on its own, in any order, by several threads.

What a slice holds depends on nothing but the inputs and the plan: sums run over the models in the plan's order, and
slices are cut alike whatever the number of threads, so that the results are the same for any.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.soup.applying import APPLY, Slice
from dmm.soup.methods import gram_matrix
from dmm.soup.plan import Merged, Plan
from dmm.soup.reading import num_not_finite
from dmm.soup.slices import pieces, slices, sums
from dmm.soup.thresholds import thresholds
from dmm.soup.writing import NewWeightFile

MAX_THREADS = 8
"""More make a merge no faster, and each has slices of its own in memory."""

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
    if plan.method.measures == "gram":
        gauge = partial(_gram, progress=progress)
    else:
        gauge = partial(thresholds, density=plan.density, progress=progress)

    merged = [tensor for tensor in plan.tensors if not tensor.copied and tensor.constant is None]
    results = in_threads([partial(gauge, tensor) for tensor in merged], threads)
    return {tensor.name: result for tensor, result in zip(merged, results, strict=True)}


def write(
    plan: Plan,
    files: Mapping[str, tuple[NewWeightFile, str]],
    measured: Mapping[str, Tensor],
    threads: int,
    progress: Progress,
) -> None:
    """Merge, and write every tensor.

    Args:
        files: for each tensor's name the file that it goes to and its name there.
        measured: from :func:`measure`.
    Raises: OSError: a file does not take what is written. UserError: a value came out NaN or infinite.
    """
    lock = threading.Lock()

    def task(tensor: Merged, start: int, stop: int) -> Callable[[], None]:
        def run() -> None:
            file, name = files[tensor.name]
            piece = file.room(name, start, stop)
            for first, last in slices(tensor, start, stop):
                values = piece[first - start : last - start]
                values.copy_(_merge(plan, tensor, first, last, measured.get(tensor.name)))
                if num_not_finite(values):
                    raise UserError(
                        f"'{tensor.name}' of the soup would hold values that are NaN or infinite in {values.dtype}, "
                        "and so was not written. Set precision: bf16 or fp32, or smaller weights."
                    )
            file.write(name, start, piece)
            with lock:
                progress(stop - start)

        return run

    in_threads((task(tensor, *piece) for tensor in plan.tensors for piece in pieces(tensor)), threads)


def _merge(plan: Plan, tensor: Merged, start: int, stop: int, measured: Tensor | None) -> Tensor:
    """One slice of one tensor, in the dtype that the sums are made in."""
    dtype = tensor.declared.dtype
    if tensor.constant is not None:
        return tensor.constant[start:stop]
    if tensor.copied:
        return tensor.models[0].read(start, stop, dtype)
    kind = sums(tensor)
    one = Slice(
        models=[source.read(start, stop, kind) for source in tensor.models],
        weights=tensor.weights,
        base=None if tensor.base is None else tensor.base.read(start, stop, kind),
        origin=None if tensor.origin is None else tensor.origin.read(start, stop, kind),
        measured=measured,
        start=start,
        keys=tensor.keys,
        density=plan.density,
        scale=plan.recipe.scale,
    )
    return APPLY[plan.recipe.method](one)


def _gram(tensor: Merged, progress: Progress) -> Tensor:
    """The scalar products of the models, or of their differences where the method has a base."""
    gram = torch.zeros(len(tensor.models), len(tensor.models), dtype=torch.float64)
    for start, stop in slices(tensor):
        models = [source.read(start, stop, torch.float64) for source in tensor.models]
        if tensor.base is not None:
            base = tensor.base.read(start, stop, torch.float64)
            models = [model - base for model in models]
        gram += gram_matrix(models)
        progress(stop - start)
    return gram


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """The slices are what runs in parallel; each is computed by one thread."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
