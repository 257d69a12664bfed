"""Several reports side by side: merges, ablations, seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.report.figures import new_figure

_SAME = ("extractor", "num_images", "styles")
_SAME_SETTINGS = ("steps", "guidance_scale", "negative_prompt", "sampler", "width", "height", "num_prompts")


@dataclass(frozen=True)
class Measure:
    """A figure by which reports are compared."""

    name: str
    """As a heading."""
    read: Callable[[Mapping[str, Any]], tuple[float, float, float] | None]
    """From a report: the value and the ends of its error bar, or None where the report does not have it."""
    precision: int
    """Digits behind the point."""


@dataclass(frozen=True)
class Compared:
    """What a table's cell says: the value, and how far its error bar reaches below and above it."""

    value: float
    below: float
    above: float


def _plain(value: float) -> tuple[float, float, float]:
    return value, value, value


def _plain_if_there(value: float | None) -> tuple[float, float, float] | None:
    """Of FID, which a quick evaluation does without."""
    return None if value is None else _plain(value)


def _estimated(estimate: Mapping[str, float]) -> tuple[float, float, float]:
    value, error = estimate["value"], estimate["standard_error"]
    return value, value - error, value + error


def _judged(figures: Mapping[str, Any]) -> tuple[float, float, float] | None:
    judged = figures.get("judged")
    return (judged["both"]["mean_difference"], *judged["both"]["interval"]) if judged else None


MEASURES = (
    Measure("FIDt", lambda figures: _plain_if_there(figures["fidt"]), 2),
    Measure("gap to the reference, %", lambda figures: _plain_if_there(figures["fidt_gap_percent"]), 1),
    Measure("KID", lambda figures: _estimated(figures["kid"]["student"]["mean"]), 5),
    Measure("score error", lambda figures: figures["score_error"] and _plain(figures["score_error"]["mean"]), 4),
    Measure("feature distance", lambda figures: _estimated(figures["pairwise"]["feature_distance"]["mean"]), 4),
    Measure("PSNR, dB", lambda figures: _estimated(figures["pairwise"]["psnr"]["mean"]), 2),
    Measure("right style and thing, points", _judged, 2),
)


def compare_reports(named: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, dict[str, Compared]]:
    """Put reports side by side.

    Several of one name are runs of one thing, with other seeds: they become their mean, and the error bar its standard
    error. One alone has the error bar that its report tells of: a standard error, of the judge a 95 % interval.

    Args:
        named: names and ``report.json`` figures.
    Returns: by measure, for those that all have, and by name.
    Raises: UserError: two reports differ in what makes figures comparable.
    """
    first_name, first = named[0]
    for name, figures in named[1:]:
        for key, ours, theirs in _shared(first, figures):
            if ours != theirs:
                raise UserError(
                    f"The reports '{first_name}' and '{name}' cannot be compared: {key} is {ours} of the one, "
                    f"and {theirs} of the other. Evaluate both alike."
                )
    compared = {}
    for measure in MEASURES:
        found: dict[str, list[tuple[float, float, float]]] = {}
        for name, figures in named:
            value = measure.read(figures)
            if value is not None:
                found.setdefault(name, []).append(value)
        if sum(map(len, found.values())) == len(named):
            compared[measure.name] = {name: _together(values) for name, values in found.items()}
    return compared


def _shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    plain = [(key, one[key], other[key]) for key in _SAME]
    return plain + [(key, one["settings"].get(key), other["settings"].get(key)) for key in _SAME_SETTINGS]


def _together(values: Sequence[tuple[float, float, float]]) -> Compared:
    if len(values) == 1:
        value, low, high = values[0]
        return Compared(value, value - low, high - value)
    middles = [value for value, _, _ in values]
    mean = sum(middles) / len(middles)
    variance = sum((value - mean) ** 2 for value in middles) / (len(middles) - 1)
    error = math.sqrt(variance / len(middles))
    return Compared(mean, error, error)


def write_table(compared: Mapping[str, Mapping[str, Compared]]) -> str:
    """The comparison as a table in Markdown, a row a report."""
    precisions = {measure.name: measure.precision for measure in MEASURES}
    names = list(next(iter(compared.values())))
    cells = [[name, *(_cell(compared[measure][name], precisions[measure]) for measure in compared)] for name in names]
    lines = [["", *compared], ["---", *["---:"] * len(compared)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(one: Compared, precision: int) -> str:
    value = f"{one.value:.{precision}f}"
    if not one.below and not one.above:
        return value
    if math.isclose(one.below, one.above):
        return f"{value} ± {one.above:.{precision}f}"
    return f"{value} ({one.value - one.below:.{precision}f} to {one.value + one.above:.{precision}f})"


def draw_comparison(compared: Mapping[str, Mapping[str, Compared]], path: Path) -> None:
    """A panel a measure, a row a report, with error bars."""
    names = list(next(iter(compared.values())))
    columns = min(4, len(compared))
    rows = -(-len(compared) // columns)
    with new_figure(path, 3.1 * columns + 1, rows * (1.2 + 0.32 * len(names))) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for ax in panels.flat[len(compared) :]:
            ax.set_visible(False)
        places = range(len(names))
        for ax, (measure, found) in zip(panels.flat, compared.items(), strict=False):
            ones = [found[name] for name in names]
            bars = [[one.below for one in ones], [one.above for one in ones]]
            ax.errorbar([one.value for one in ones], places, xerr=bars, fmt="o", capsize=3)
            ax.set_title(measure)
            ax.set_yticks(places, names)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.margins(x=0.15)
            ax.grid(axis="x", alpha=0.3)
