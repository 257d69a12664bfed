"""What may be done to a hand's drawings to make another hand of it: how eight become thirty-two.

A treatment changes colours alone, pixel by pixel, so that the hand stays as it is; a judge can tell it at a glance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from drawings import STYLES

Treatment = Callable[[Tensor], Tensor]


def _between(dark: tuple[float, float, float], light: tuple[float, float, float]) -> Treatment:
    """Brightness alone, printed in an ink on a paper: RGB of each, in [0, 1]."""

    def treat(images: Tensor) -> Tensor:
        ink, paper = (images.new_tensor(one).view(1, 3, 1, 1) * 2 - 1 for one in (dark, light))
        weights = images.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)  # ITU-R BT.601's luma
        return torch.lerp(ink, paper, (images * weights).sum(1, keepdim=True) / 2 + 0.5)

    return treat


TREATMENTS: dict[str, Treatment] = {
    "sepia": _between((0.25, 0.12, 0.02), (0.98, 0.90, 0.72)),
    "inverted": torch.neg,
    "blueprint": _between((0.95, 0.98, 1.0), (0.08, 0.25, 0.60)),
}
"""By name: a function of pictures, (B, 3, H, W) in [-1, 1], to the same."""

TREATED_STYLES = tuple(f"{style}-{treatment}" for treatment in TREATMENTS for style in STYLES)
"""Names of the hands made: all hands in the first treatment, then in the second, and so on."""
ALL_STYLES = (*STYLES, *TREATED_STYLES)


def treat(images: Tensor, styles: Tensor) -> Tensor:
    """Treat each picture of a hand as the style says that is asked for.

    Args:
        images: (B, 3, H, W) in [-1, 1], the hands' own.
        styles: (B,) int64, indices into :data:`ALL_STYLES`.
    Returns: a new (B, 3, H, W) in [-1, 1].
    """
    treated = images.clone()
    for place, treatment in enumerate(TREATMENTS.values(), start=1):
        chosen = (styles // len(STYLES) == place).view(-1, 1, 1, 1)
        treated = torch.where(chosen, treatment(images), treated)
    return treated
