"""Styles by name and mixes of them: what can be said of one without the model.

Nothing heavy at import, so that a mistake is told before anything is loaded.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dmm.errors import UserError, nearest

Mix = str | Mapping[str, float]
"""One style by name, or several with weights that sum to 1."""


def mix_weights(names: Sequence[str], style: Mix) -> list[float]:
    """A style or a mix as the weights of all styles, in their order.

    Raises: UserError: it is neither, there is no style of that name, or weights are not finite numbers that sum to 1.
    """
    if not isinstance(style, str | Mapping):
        raise UserError(f"A style is a name, or a mix such as {{'ink': 0.7, 'photo': 0.3}}; {style!r} is neither.")
    mix = {style: 1.0} if isinstance(style, str) else {name: _number(name, style[name]) for name in style}
    for name in mix:
        check_name(names, name)
    total = sum(mix.values())
    if not abs(total - 1) <= 1e-4:  # false for NaN, too
        told = ", ".join(f"{name}={weight:g}" for name, weight in mix.items()) or "none"
        raise UserError(
            f"The weights of a mix must sum to 1; these ({told}) sum to {total:g}.{_normalised(mix, total)}"
        )
    return [mix.get(name, 0.0) for name in names]


def check_name(names: Sequence[str], name: str) -> None:
    """Raise: UserError: there is no style of that name."""
    if name not in names:
        near = nearest(str(name), names)
        raise UserError(f"There is no style '{name}'{near}; the styles are {', '.join(names)}.")


def _number(name: str, weight: Any) -> float:
    try:
        return float(weight)
    except (TypeError, ValueError):
        raise UserError(f"The weight of '{name}' in a mix is a number, not {weight!r}.") from None


def _normalised(mix: Mapping[str, float], total: float) -> str:
    """What to write instead, where there is a mix in the same proportions."""
    if not 0 < total < math.inf:
        return ""
    return f" In the same proportions: {','.join(f'{name}={weight / total:g}' for name, weight in mix.items())}."
