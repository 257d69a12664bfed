"""Curves as a picture of lines that the page itself draws."""

import math
from collections.abc import Mapping
from html import escape

from dmm.app.watching import Curve

_WIDTH, _HEIGHT = 800, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 34


def chart(curves: Mapping[str, Curve]) -> str:
    """Curves over their steps, by name; on a scale of powers of ten where all values are above 0.

    Returns: HTML, an SVG and its legend with each curve's last value.
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return '<div class="dmm-empty">Curves appear here once something is logged.</div>'
    is_log = min(value for _, value in points) > 0
    last_step = max(step for step, _ in points) or 1
    low, high = (bound(value for _, value in points) for bound in (min, max))
    scale = (lambda value: math.log10(value)) if is_log else (lambda value: value)
    bottom, top = scale(low), scale(high)
    if top - bottom < 1e-9:
        bottom, top = bottom - 0.5, top + 0.5

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last_step

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (scale(value) - bottom) / (top - bottom)

    parts = []
    for value in _ticks(low, high, is_log):
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="tick"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for i in range(5):
        step = last_step * i / 4
        anchor = "start" if i == 0 else "end" if i == 4 else "middle"
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{round(step):,}</text>')
    for i, curve in enumerate(curves.values()):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(i, len(curves))}" stroke-width="1.8"/>')
    legend = "".join(
        f'<span><i style="background: {_colour(i, len(curves))}"></i>{escape(name)} {curve[-1][1]:.4g}</span>'
        for i, (name, curve) in enumerate(curves.items())
    )
    drawn = "".join(parts)
    return (
        f'<div class="dmm-chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="curves">{drawn}</svg>'
        f"<div>{legend}</div></div>"
    )


def _ticks(low: float, high: float, is_log: bool) -> list[float]:
    """A few round values between two."""
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1,)):
            ticks = [digit * 10.0**power for power in powers for digit in digits]
            found = [tick for tick in ticks if low <= tick <= high]
            if len(found) <= 8:
                return found or [low]
        return found[:: math.ceil(len(found) / 8)]
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)] or [low]


def _colour(i: int, count: int) -> str:
    return f"hsl({360 * i / count:.0f} 65% 50%)"
