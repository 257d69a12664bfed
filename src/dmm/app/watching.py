"""What a merge's folder tells of how it goes: its curves by style, its newest samples, and how long it takes yet."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.files.json import parse_json
from dmm.files.runs import LOG, RECIPE, SAMPLES, STYLE_RUNS, find_run
from dmm.files.text import read_text

Curve = Sequence[tuple[int, float]]
"""Steps and values."""

MAX_POINTS = 400
"""Of a curve: more are not seen."""
_PACE = 20  # lines of a log, of whose steps the median is taken
_MOST_LOG = 2**30  # bytes


@dataclass(frozen=True)
class Watched:
    """A merge at one moment.

    Attributes:
        told: how far it is, in a sentence.
        curves: of each term of the losses, the mean and, behind a slash, of each style.
        samples: the newest picture of samples.
        recipe: its text.
    """

    told: str
    curves: Mapping[str, Curve]
    samples: Path | None
    recipe: str

    @property
    def terms(self) -> list[str]:
        """What there are curves of, the nearest to how good it is first."""
        names = list(dict.fromkeys(name.partition("/")[0] for name in self.curves))
        return sorted(names, key=lambda name: (name != "score_error", name != "score", name == "learning_rate"))

    def of_term(self, term: str) -> dict[str, Curve]:
        """The curves of a term by style; the mean's where it has no styles."""
        of_styles = {name.partition("/")[2]: one for name, one in self.curves.items() if name.startswith(f"{term}/")}
        return of_styles or {name: one for name, one in self.curves.items() if name == term}


def look_at(folder: Path) -> Watched:
    """Read a merge's folder, whether it goes on meanwhile or not.

    Raises: UserError: it is no merge's, or damaged.
    """
    run = find_run(folder)
    if run is None:
        raise UserError(f"{folder} is not the folder of a merge: it has no {RECIPE} with checkpoints beside it.")
    of_styles = sorted(run.folder.glob(f"{STYLE_RUNS}/*/{LOG}"), key=lambda log: log.stat().st_mtime)
    logs = {log.parent.name: _read_log(log) for log in of_styles} or {"": _read_log(run.folder / LOG)}
    curves: dict[str, Curve] = {}
    for style, lines in logs.items():
        # a style's own run logs its mean, which is that of the style, too
        curves |= {name: one for name, one in _curves(lines).items() if "/" in name or not style}
    samples = sorted((run.folder / SAMPLES).glob("step-*.png"))
    return Watched(
        told=f"{folder.resolve().name}: {_told(logs, run.num_steps, run.is_finished, run.is_first_stage)}",
        curves=curves,
        samples=samples[-1] if samples else None,
        recipe=read_text(run.folder / RECIPE),
    )


def _told(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], num_steps: int, is_finished: bool, is_first_stage: bool
) -> str:
    if is_finished:
        return "finished."
    style, lines = list(logs.items())[-1]
    if not lines:
        return "nothing is logged yet."
    step = lines[-1]["step"]
    stage = " of its first stage" if is_first_stage else ""
    which = f", style {style} ({len(logs)} begun)" if style else ""
    pace = _seconds_a_step(lines)
    left = "" if pace is None else f"; {pace:.3g} s a step, {_duration(pace * max(num_steps - step, 0))} left"
    return f"step {step:,} of {num_steps:,}{stage}{which}{left}{' of this style' if style and left else ''}."


def _seconds_a_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The median over the last lines, which a pause between two runs does not move; None of a single line."""
    last = [(line["step"], line["time"]) for line in lines[-_PACE:] if _is_number(line.get("time"))]
    paces = [
        (time - earlier) / (step - before)
        for (before, earlier), (step, time) in pairwise(last)
        if step > before and time >= earlier
    ]
    return statistics.median(paces) if paces else None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _read_log(log: Path) -> list[dict[str, Any]]:
    """A log's lines, thinned out, the last ones whole; what is cut short by being written just now is left out."""
    if not log.is_file():
        return []
    lines = read_text(log, largest=_MOST_LOG).split("\n")[:-1]
    stride = max(1, len(lines) // MAX_POINTS)
    kept = lines[:-_PACE:stride] + lines[-_PACE:] if len(lines) > _PACE else lines
    read = [parse_json(line, f"'{log.name}'") for line in kept]
    return [line for line in read if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time") and _is_number(value):
                curves.setdefault(name, []).append((line["step"], value))
    return dict(curves)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
