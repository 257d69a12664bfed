"""Loss curves: each term's mean since they were last taken, over all samples and for every style."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmm.distill import Batch


class Curves:
    """Sums of per-sample values, kept on the device until they are taken.

    Args:
        styles: names, by index.
        device: of the values.
    """

    def __init__(self, styles: Sequence[str], device: torch.device) -> None:
        self._styles, self._device = styles, device
        self._sums: dict[str, Tensor] = {}
        self._counts = torch.zeros(len(styles), device=device)

    def add(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Add a batch's values: for each term, (B,)."""
        self._counts += batch.style_weights.sum(0)
        for name, values in terms.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(len(self._styles), device=self._device)
            self._sums[name] += values @ batch.style_weights

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes' samples, ``score`` and ``score/anime``, and begin anew."""
        counts = accelerator.reduce(self._counts, reduction="sum")
        scalars = {}
        for name, sums in self._sums.items():
            means = accelerator.reduce(sums, reduction="sum") / counts
            # of the styles, not of the samples: as the loss weighs them
            scalars[name] = means.mean().item()
            scalars |= {f"{name}/{style}": mean.item() for style, mean in zip(self._styles, means, strict=True)}
        self._sums, self._counts = {}, torch.zeros_like(self._counts)
        return scalars
