"""The registry of methods: what each is called, needs and measures beforehand; nothing heavy at import."""

from dataclasses import dataclass
from typing import Literal

SOUPS = "https://arxiv.org/abs/2203.05482"


@dataclass(frozen=True)
class Method:
    """What is to be known of a method to run it.

    Attributes:
        title: for people.
        paper: where it comes from.
        weights: ``relative`` ones are divided by their sum, ``scales`` are used as they are, ``none`` are taken.
        needs_base: it works on differences from the base.
        measures: what is measured of whole tensors beforehand.
        options: which further keys of the recipe it reads.
        ordered: the models' order means something; elsewhere they are sorted by name, so that it cannot.
        light: it takes no longer than reading and writing do.
    """

    title: str
    paper: str
    weights: Literal["relative", "scales", "none"]
    needs_base: bool = False
    measures: Literal["gram", "thresholds"] | None = None
    options: tuple[str, ...] = ()
    ordered: bool = False
    light: bool = False


_TASK_ARITHMETIC = Method(
    "weighted differences, added to the base",
    "https://arxiv.org/abs/2212.04089",
    "scales",
    needs_base=True,
    options=("origin",),
    light=True,
)

METHODS: dict[str, Method] = {
    "soup": Method("the uniform average", SOUPS, "none", light=True),
    "greedy": Method("the average of those that a score wants", SOUPS, "none", options=("score",), light=True),
    "weighted_sum": Method("the weighted average", SOUPS, "relative", light=True),
    "task_arithmetic": _TASK_ARITHMETIC,
    "add_difference": _TASK_ARITHMETIC,
    "slerp": Method(
        "along the arc between two",
        "https://doi.org/10.1145/325334.325242",
        "relative",
        measures="gram",
        ordered=True,
    ),
    "model_stock": Method(
        "from the base, as far as the models agree",
        "https://arxiv.org/abs/2403.19522",
        "none",
        needs_base=True,
        measures="gram",
    ),
    "ties": Method(
        "trim, elect a sign, average",
        "https://arxiv.org/abs/2306.01708",
        "relative",
        needs_base=True,
        measures="thresholds",
        options=("density", "scale"),
    ),
    "dare": Method(
        "drop at random, rescale, add to the base",
        "https://arxiv.org/abs/2311.03099",
        "scales",
        needs_base=True,
        options=("density", "seed"),
    ),
    "dare_ties": Method(
        "drop at random, elect a sign, average",
        "https://arxiv.org/abs/2311.03099",
        "relative",
        needs_base=True,
        options=("density", "scale", "seed"),
    ),
}
