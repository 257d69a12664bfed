"""Style over time: which style, or mix, a denoising run paints in when.

Nothing heavy at import, so that a mistake is told before anything is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dmm.errors import UserError
from dmm.maths.mixes import Mix, mix_weights

Part = tuple[float, float, Mix | None]
"""From when to when, as fractions of the run's steps, and in which style or mix; None is without one."""


@dataclass(frozen=True)
class StyleSchedule:
    """Parts of a run, each in its own style: ``StyleSchedule([(0, 0.4, "ink"), (0.4, 1, {"photo": 1.0})])``.

    Attributes:
        parts: in order, from 0 to 1 without a gap.
    Raises: UserError: they are not.
    """

    parts: Sequence[Part]

    def __post_init__(self) -> None:
        reached = 0.0
        for start, end, _ in self.parts:
            if start != reached:
                raise UserError(
                    f"The parts of a style over time must follow each other from 0 to 1: one begins at {start:g} "
                    f"where {reached:g} was expected."
                )
            if not start < end <= 1:
                raise UserError(
                    f"A part of a style over time must end after it begins, and at 1 at most: {start:g}-{end:g} does "
                    "not."
                )
            reached = end
        if reached != 1:
            raise UserError(f"The parts of a style over time must reach from 0 to 1; these end at {reached:g}.")

    def at(self, fraction: float) -> Mix | None:
        """The style at a fraction of the run, in [0, 1): step i of n is at i / n."""
        return next(style for _, end, style in self.parts if fraction < end)


def check_style(names: Sequence[str], style: StyleSchedule | Mix | None) -> None:
    """Check a style, a mix or a style over time against the styles that there are.

    Raises: UserError: there is no style of that name, or weights do not sum to 1.
    """
    for mix in [part for _, _, part in style.parts] if isinstance(style, StyleSchedule) else [style]:
        if mix is not None:
            mix_weights(names, mix)
