"""Loss curves: each term's mean since they were last taken, over all samples and for every style."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmm.training.distill import Samples


class Curves:
    """Sums of per-sample values, kept on the device until they are taken.

    Args:
        styles: names, by index.
        device: of the values.
    """

    def __init__(self, styles: Sequence[str], device: torch.device) -> None:
        self._styles, self._device = styles, device
        # of each term, by style: the sum of its values, and their number
        self._sums: dict[str, Tensor] = {}

    def add(self, batch: Samples, terms: Mapping[str, Tensor]) -> None:
        """Add a batch's values: for each term, (B,)."""
        for name, values in terms.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(2, len(self._styles), device=self._device)
            self._sums[name] += torch.stack([values, torch.ones_like(values)]) @ batch.style_weights

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes' samples, ``score`` and ``score/anime``, and begin anew."""
        scalars = {}
        for name, sums in self._sums.items():
            total, count = accelerator.reduce(sums, reduction="sum")
            means = (total / count).tolist()
            # an earlier style is drawn by chance, and so may not be there
            told = {style: means[i] for i, style in enumerate(self._styles) if count[i]}
            # of the styles, not of the samples: each counts alike, whatever its share of the batch
            scalars[name] = sum(told.values()) / len(told)
            scalars |= {f"{name}/{style}": mean for style, mean in told.items()}
        self._sums = {}
        return scalars
