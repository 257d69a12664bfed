"""What a report comes to, in one sentence for people who read no tables."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_WORDS = ("paints as its teachers do", "paints nearly as its teachers do", "falls behind its teachers")
_WORST = "does not yet paint as its teachers do"
# where a word ends: points lost by the judge; per cent of FIDt above the teachers' own
_POINTS = (1.5, 5, 20)
_GAPS = (25, 100, 400)


def model_name(figures: Mapping[str, Any]) -> str:
    """What the evaluated model is called: the last word of its path or id."""
    source = str(figures["sources"]["student"]["source"])
    return PurePath(source).name or source


def verdict(figures: Mapping[str, Any]) -> str:
    """One sentence of how well a student does, and of the style that is furthest behind.

    It goes by what the judge says, where it was asked; else by FIDt beside the teachers' own.

    Args:
        figures: of ``report.json``.
    """
    name = model_name(figures)
    judged = figures["judged"]
    if judged:
        both = judged["both"]
        student, teacher = (sum(both[who].values()) / len(both[who]) for who in ("student", "teacher"))
        found = (
            f"{student:.0f} of 100 of its pictures are of the right thing in the right style, {teacher:.0f} of its "
            "teachers'"
        )
        lost, bounds, by_style = -both["mean_difference"], _POINTS, {s: -d for s, d in both["difference"].items()}
    else:
        gap = figures["fidt_gap_percent"]
        found = (
            f"its pictures are {_times(1 + gap / 100)} as far from its teachers' (FID) as other pictures of the same "
            "teachers are"
        )
        lost, bounds = gap, _GAPS
        own, best = figures["fid_matrix"], figures["fid_reference"]
        by_style = {style: own[i][i] / best[i][i] for i, style in enumerate(figures["styles"])}
    word = next((word for word, bound in zip(_WORDS, bounds, strict=True) if lost <= bound), _WORST)
    worst = max(by_style, key=by_style.__getitem__)
    weakest = f"; furthest behind is {worst}" if len(by_style) > 1 and lost > bounds[0] else ""
    unknown = len(figures["styles"]) - len(by_style)
    left = f" ({unknown} of its styles the judge does not know)" if unknown else ""
    return f"{name} {word}: {found}{weakest}{left}."


def _times(factor: float) -> str:
    return f"{factor:.2g} times" if factor >= 1.05 else "just"
