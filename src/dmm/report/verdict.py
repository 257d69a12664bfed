"""What a report comes to, in one sentence for people who read no tables."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

_WORDS = ("paints as its teachers do", "paints nearly as its teachers do", "falls behind its teachers")
_WORST = "does not yet paint as its teachers do"
# where a word ends: points lost by the judge; per cent of FIDt above the teachers' own; the score error of merges that
# lose as many points by the judge (docs/merge.md, "Is it good enough?")
_POINTS = (1.5, 5, 20)
_GAPS = (25, 100, 400)
_ERRORS = (0.15, 0.3, 0.4)
_SURE = 3  # standard errors of KID that no chance makes, as few blocks as tell them


class _Measured(NamedTuple):
    """A student by one yardstick."""

    found: str
    """What is said of it."""
    lost: float
    bounds: tuple[float, float, float]
    """Of what is lost, where a word ends."""
    by_style: Mapping[str, float]
    """How far each style is behind; the furthest has the most."""


def model_name(figures: Mapping[str, Any]) -> str:
    """What the evaluated model is called: the last word of its path or id."""
    source = str(figures["sources"]["student"]["source"])
    return PurePath(source).name or source


def verdict(figures: Mapping[str, Any]) -> str:
    """One sentence of how well a student does, and of the style that is furthest behind.

    It goes by what the judge says, where it was asked; else by FIDt beside the teachers' own. A quick evaluation has no
    FID: it goes by the score error and, where there is no base to measure it beside, by whether KID sees a difference.

    Args:
        figures: of ``report.json``.
    """
    name = model_name(figures)
    if figures["judged"]:
        measured = _by_judge(figures["judged"]["both"])
    elif figures["fid_matrix"]:
        measured = _by_fid(figures)
    elif figures["score_error"]:
        measured = _by_score_error(figures["score_error"])
    else:
        return _by_kid(name, figures)
    found, lost, bounds, by_style = measured
    word = next((word for word, bound in zip(_WORDS, bounds, strict=True) if lost <= bound), _WORST)
    worst = max(by_style, key=by_style.__getitem__)
    weakest = f"; furthest behind is {worst}" if len(by_style) > 1 and lost > bounds[0] else ""
    unknown = len(figures["styles"]) - len(by_style)
    left = f" ({unknown} of its styles the judge does not know)" if unknown else ""
    return f"{name} {word}: {found}{weakest}{left}."


def _by_judge(both: Mapping[str, Any]) -> _Measured:
    student, teacher = (sum(both[who].values()) / len(both[who]) for who in ("student", "teacher"))
    found = (
        f"{student:.0f} of 100 of its pictures are of the right thing in the right style, {teacher:.0f} of its "
        "teachers'"
    )
    return _Measured(found, -both["mean_difference"], _POINTS, {s: -d for s, d in both["difference"].items()})


def _by_fid(figures: Mapping[str, Any]) -> _Measured:
    gap = figures["fidt_gap_percent"]
    found = (
        f"its pictures are {_times(1 + gap / 100)} as far from its teachers' (FID) as other pictures of the same "
        "teachers are"
    )
    own, best = figures["fid_matrix"], figures["fid_reference"]
    return _Measured(found, gap, _GAPS, {style: own[i][i] / best[i][i] for i, style in enumerate(figures["styles"])})


def _by_score_error(errors: Mapping[str, Any]) -> _Measured:
    found = f"its predictions are {errors['mean']:.2f} as far from its teachers' as the base's are (score error)"
    return _Measured(found, errors["mean"], _ERRORS, errors["by_style"])


def _by_kid(name: str, figures: Mapping[str, Any]) -> str:
    """Whether a difference is seen at all, which is all that few pictures tell."""
    kid = figures["kid"]["student"]["mean"]
    told = f"{figures['num_images']} pictures of each style"
    if kid["value"] <= _SURE * kid["standard_error"]:
        return f"{name} cannot be told from its teachers by {told} (KID); more would tell more."
    by_style = {style: one["value"] for style, one in figures["kid"]["student"]["by_style"].items()}
    weakest = f"; furthest off is {max(by_style, key=by_style.__getitem__)}" if len(by_style) > 1 else ""
    return f"{name} does not paint as its teachers do: {told} show it (KID){weakest}."


def _times(factor: float) -> str:
    return f"{factor:.2g} times" if factor >= 1.05 else "just"
