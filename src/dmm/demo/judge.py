"""The judge of the embedded experts says which hand drew a picture, and what it shows.

Its penultimate features are the feature space for FID on this family, as Inception's are for
photographs; its two heads say whether a picture is in the right style and of the right thing.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor, nn

from dmm.demo.assembly import WEIGHTS


@dataclass(frozen=True)
class Verdict:
    """What the judge says of B pictures.

    Attributes:
        features: (B, D), non-negative: the mean activations of every stage, strokes first, things last.
        style_logits: (B, number of styles).
        concept_logits: (B, number of concepts).
    """

    features: Tensor
    style_logits: Tensor
    concept_logits: Tensor


class Judge(ModelMixin, ConfigMixin):
    """A small residual classifier with a style head and a concept head.

    Args:
        styles: names of the styles, in the order of the style head.
        concepts: names of the concepts, in the order of the concept head.
        channels: width of each stage; each halves the resolution. Their sum is D, the features' dimension.
        sample_size: pixels a side of the pictures it judges.
    """

    @register_to_config
    def __init__(
        self,
        styles: tuple[str, ...],
        concepts: tuple[str, ...],
        channels: tuple[int, ...] = (64, 128, 128),
        sample_size: int = 32,
    ) -> None:
        super().__init__()
        widths = (3, *channels)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                    ResidualBlock(after),
                )
                for before, after in itertools.pairwise(widths)
            ]
        )
        self.dropout = nn.Dropout(0.2)
        self.style_head = nn.Linear(sum(channels), len(styles))
        self.concept_head = nn.Linear(sum(channels), len(concepts))

    def forward(self, images: Tensor) -> Verdict:
        """Judge pictures.

        Args:
            images: (B, 3, S, S) in [-1, 1], S the configured ``sample_size``.
        Raises: ValueError: pictures of another size.
        """
        size = self.config.sample_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"The judge takes pictures of shape (B, 3, {size}, {size}), not {tuple(images.shape)}.")
        # a hand shows in strokes and shading, a thing in its shape: the heads see all scales
        pooled, x = [], images
        for stage in self.stages:
            x = stage(x)
            pooled.append(x.mean((2, 3)))
        features = torch.cat(pooled, 1)
        kept = self.dropout(features)
        return Verdict(features, self.style_head(kept), self.concept_head(kept))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, ending in ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return torch.relu(x + self.branch(x))


def load_judge() -> Judge:
    """The judge that was trained on all of the drawings, in float32 and ``eval``."""
    judge: Judge = Judge.from_pretrained(WEIGHTS / "judge", dtype=torch.float32)
    return judge.eval()


@torch.no_grad()
def judge_images(judge: Judge, images: Sequence[Image.Image], batch_size: int = 256) -> Verdict:
    """Judge RGB pictures of the judge's size.

    Raises: ValueError: pictures of another size.
    """
    verdicts = []
    for start in range(0, len(images), batch_size):
        pixels = np.stack([np.asarray(image) for image in images[start : start + batch_size]])
        verdicts.append(judge(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1))
    return Verdict(
        torch.cat([verdict.features for verdict in verdicts]),
        torch.cat([verdict.style_logits for verdict in verdicts]),
        torch.cat([verdict.concept_logits for verdict in verdicts]),
    )
