"""Mixes of styles, over time where they change: what the wires between the nodes carry."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .side_car import StyleSet

NONE = "(none)"
"""What a widget says where no style is chosen."""


@dataclass(frozen=True)
class Part:
    """A mix, and until when it is painted in, as a share of the steps, in (0, 1]."""

    end: float
    shares: Mapping[str, float]
    """By style; a weight is a share divided by their sum."""

    @property
    def weights(self) -> dict[str, float]:
        """By style, summing to 1.

        Raises: ValueError: the shares sum to nothing.
        """
        total = sum(self.shares.values())
        if not (math.isfinite(total) and total > 0):
            raise ValueError(f"The weights of a style mix sum to {total:g}: choose at least one style, with a weight.")
        return {name: share / total for name, share in self.shares.items()}


@dataclass(frozen=True)
class Style:
    """A mix, or several, one after another; the last part ends at 1."""

    styles: StyleSet
    parts: Sequence[Part]

    @property
    def names(self) -> list[str]:
        """Of the styles that take part."""
        return list(dict.fromkeys(name for part in self.parts for name in part.shares))

    @property
    def adapted(self) -> list[str]:
        """Those among them that change weights."""
        return [name for name in self.names if name in self.styles.adapters]


def mix(styles: StyleSet, chosen: Sequence[tuple[str, float]], others: Style | None = None) -> Style:
    """A mix of the chosen styles with their shares, and of those of another mix.

    Raises: ValueError: there is no style of that name, or the other is a style over time, or another model's.
    """
    shares: dict[str, float] = {}
    if others is not None:
        if len(others.parts) > 1:
            raise ValueError("A style over time cannot be mixed with others: mix its parts before they are scheduled.")
        if others.styles is not styles:
            raise ValueError("Two style mixes are of different models: connect both to the STYLES of one.")
        shares.update(others.parts[0].shares)
    for name, share in chosen:
        if name == NONE or not share:
            continue
        if name not in styles.names:
            raise ValueError(f"There is no style '{name}' in this model; its styles are {', '.join(styles.names)}.")
        shares[name] = shares.get(name, 0.0) + share
    made = Style(styles, (Part(1.0, shares),))
    made.parts[0].weights  # noqa: B018  (raises where there is nothing to paint in)
    return made


def then(before: Style, after: Style, at: float) -> Style:
    """One style until a share of the steps, another from there on; either may change over time itself.

    Raises: ValueError: they are of different models.
    """
    if before.styles is not after.styles:
        raise ValueError("The styles before and after are of different models: connect both to the STYLES of one.")
    parts = [part for part in before.parts if part.end < at]
    if at > 0:
        parts.append(Part(at, next(part.shares for part in before.parts if at <= part.end)))
    parts += [part for part in after.parts if part.end > at]
    return Style(before.styles, tuple(parts))
