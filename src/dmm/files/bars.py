"""Progress bars of what is done by parts: a step of sampling is worth a share of a picture."""

from typing import Any

from tqdm import tqdm

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"


class PartsBar(tqdm):  # type: ignore[type-arg]
    """A bar over a number of things that shows how many are done in whole numbers, however it got there.

    Args:
        total: how many there are.
        unit: what they are, as " images".
        title: what stands before the bar.
    """

    def __init__(self, total: int, unit: str, title: str = "", **settings: Any) -> None:
        super().__init__(total=total, unit=unit, desc=title and f"{title}: ", bar_format=_FORMAT, **settings)

    def update(self, n: float | None = 1) -> bool | None:
        """Go on by what was done; shares that add up to a hair too much end at the total, as tqdm minds more."""
        return super().update(min(n or 0, (self.total or 0) - self.n))
