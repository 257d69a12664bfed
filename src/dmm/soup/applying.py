"""What each method of the registry does to one slice of a tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmm.soup import methods


@dataclass(frozen=True)
class Slice:
    """One slice of one tensor of every model, flattened, in the dtype of the sums.

    Attributes:
        base, origin: None where the method takes none.
        weights: one a model, as the method reads them.
        measured: of the whole tensor: a gram matrix (k, k), or thresholds (k,).
        start: place of the first element in its tensor.
        keys: of the models' random masks.
    """

    models: Sequence[Tensor]
    weights: Sequence[float]
    base: Tensor | None = None
    origin: Tensor | None = None
    measured: Tensor | None = None
    start: int = 0
    keys: Sequence[tuple[int, int]] = ()
    density: float = 1.0
    scale: float = 1.0

    @property
    def fine_tuned_from(self) -> Tensor:
        """The base, of a method that needs one."""
        assert self.base is not None
        return self.base

    @property
    def kept(self) -> list[Tensor]:
        """The models' random masks, each made as it is asked for."""
        count = self.fine_tuned_from.numel()
        return [methods.random_mask(key, self.start, count, self.density) for key in self.keys]


def _weighted_sum(one: Slice) -> Tensor:
    return methods.weighted_sum(one.models, one.weights)


def _task_arithmetic(one: Slice) -> Tensor:
    return methods.task_arithmetic(one.fine_tuned_from, one.models, one.weights, one.origin)


def _slerp(one: Slice) -> Tensor:
    return methods.slerp(one.models, one.weights, one.measured)


def _model_stock(one: Slice) -> Tensor:
    return methods.model_stock(one.fine_tuned_from, one.models, one.measured)


def _ties(one: Slice) -> Tensor:
    thresholds = None if one.measured is None else one.measured.tolist()
    base = one.fine_tuned_from
    return methods.ties(base, one.models, one.weights, density=one.density, scale=one.scale, thresholds=thresholds)


def _dare(one: Slice) -> Tensor:
    return methods.dare(one.fine_tuned_from, one.models, one.weights, kept=one.kept, density=one.density)


def _dare_ties(one: Slice) -> Tensor:
    base = one.fine_tuned_from
    return methods.dare_ties(base, one.models, one.weights, kept=one.kept, density=one.density, scale=one.scale)


APPLY: dict[str, Callable[[Slice], Tensor]] = {
    "soup": _weighted_sum,
    "greedy": _weighted_sum,
    "weighted_sum": _weighted_sum,
    "task_arithmetic": _task_arithmetic,
    "add_difference": _task_arithmetic,
    "slerp": _slerp,
    "model_stock": _model_stock,
    "ties": _ties,
    "dare": _dare,
    "dare_ties": _dare_ties,
}
"""By the registry's names."""


def accumulator(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of the sums: float32 where all inputs have half of its precision, float64 where any has more."""
    return torch.float32 if all(dtype.itemsize <= 2 for dtype in dtypes) else torch.float64
