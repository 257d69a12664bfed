"""Styles by name and mixes of them: what can be said of one without the model.

Nothing heavy at import, so that a mistake is told before anything is loaded.
"""

from collections.abc import Mapping, Sequence

from dmm.errors import UserError, nearest

Mix = str | Mapping[str, float]
"""One style by name, or several with weights that sum to 1."""


def mix_weights(names: Sequence[str], style: Mix) -> list[float]:
    """A style or a mix as the weights of all styles, in their order.

    Raises: UserError: there is no style of that name, or weights are not finite numbers that sum to 1.
    """
    mix = {style: 1.0} if isinstance(style, str) else style
    for name in mix:
        if name not in names:
            raise UserError(f"There is no style '{name}'{nearest(name, names)}; the styles are {', '.join(names)}.")
    total = sum(mix.values())
    if not abs(total - 1) <= 1e-4:  # false for NaN, too
        told = ", ".join(f"{name}={weight:g}" for name, weight in mix.items()) or "none"
        raise UserError(f"The weights of a mix must sum to 1; these ({told}) sum to {total:g}.")
    return [float(mix.get(name, 0.0)) for name in names]
