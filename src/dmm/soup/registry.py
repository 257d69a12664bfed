"""The registry of methods: what each is called, needs, measures beforehand and does to one slice of a tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmm.soup import methods

SOUPS = "https://arxiv.org/abs/2203.05482"


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


@dataclass(frozen=True)
class Method:
    """What is to be known of a method to run it.

    Attributes:
        title: for people.
        paper: where it comes from.
        weights: ``relative`` ones are divided by their sum, ``scales`` are used as they are, ``none`` are taken.
        apply: what it does.
        needs_base: it works on differences from the base.
        measures: what is measured of whole tensors beforehand.
        options: which further keys of the recipe it reads.
        ordered: the models' order means something; elsewhere they are sorted by name, so that it cannot.
        light: it takes no longer than reading and writing do.
    """

    title: str
    paper: str
    weights: Literal["relative", "scales", "none"]
    apply: Callable[[Slice], Tensor]
    needs_base: bool = False
    measures: Literal["gram", "thresholds"] | None = None
    options: tuple[str, ...] = ()
    ordered: bool = False
    light: bool = False


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


_TASK_ARITHMETIC = Method(
    "weighted differences, added to the base",
    "https://arxiv.org/abs/2212.04089",
    "scales",
    _task_arithmetic,
    needs_base=True,
    options=("origin",),
    light=True,
)

METHODS: dict[str, Method] = {
    "soup": Method("the uniform average", SOUPS, "none", _weighted_sum, light=True),
    "greedy": Method(
        "the average of those that a score wants", SOUPS, "none", _weighted_sum, options=("score",), light=True
    ),
    "weighted_sum": Method("the weighted average", SOUPS, "relative", _weighted_sum, light=True),
    "task_arithmetic": _TASK_ARITHMETIC,
    "add_difference": _TASK_ARITHMETIC,
    "slerp": Method(
        "along the arc between two",
        "https://doi.org/10.1145/325334.325242",
        "relative",
        _slerp,
        measures="gram",
        ordered=True,
    ),
    "model_stock": Method(
        "from the base, as far as the models agree",
        "https://arxiv.org/abs/2403.19522",
        "none",
        _model_stock,
        needs_base=True,
        measures="gram",
    ),
    "ties": Method(
        "trim, elect a sign, average",
        "https://arxiv.org/abs/2306.01708",
        "relative",
        _ties,
        needs_base=True,
        measures="thresholds",
        options=("density", "scale"),
    ),
    "dare": Method(
        "drop at random, rescale, add to the base",
        "https://arxiv.org/abs/2311.03099",
        "scales",
        _dare,
        needs_base=True,
        options=("density", "seed"),
    ),
    "dare_ties": Method(
        "drop at random, elect a sign, average",
        "https://arxiv.org/abs/2311.03099",
        "relative",
        _dare_ties,
        needs_base=True,
        options=("density", "scale", "seed"),
    ),
}


def accumulator(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of the sums: float32 where all inputs have half of its precision, float64 where any has more."""
    return torch.float32 if all(dtype.itemsize <= 2 for dtype in dtypes) else torch.float64
