"""Regions and tiles of a canvas as weights: whose prediction counts where, and how much."""

import torch
from torch import Tensor
from torch.nn import functional as F

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels from the upper left corner."""


def box_mask(box: Box, height: int, width: int) -> Tensor:
    """How much of each pixel a box covers; (height, width) in [0, 1]."""
    x0, y0, x1, y1 = box
    columns = (torch.arange(width) + 1).clamp(max=x1) - torch.arange(width).clamp(min=x0)
    rows = (torch.arange(height) + 1).clamp(max=y1) - torch.arange(height).clamp(min=y0)
    return rows.clamp(0, 1)[:, None] * columns.clamp(0, 1)[None, :]


def region_weights(masks: Tensor, shrink: int, feather: float) -> Tensor:
    """How much each region's prediction counts in each latent pixel; what no region covers is the background's.

    Args:
        masks: (R, H, W) in [0, 1], in pixels of the picture; they may overlap, and then share what they both cover.
        shrink: pixels of the picture in one latent pixel, a side.
        feather: standard deviation, in latent pixels, of the Gaussian that softens borders; 0 leaves them hard.
    Returns: (R + 1, H / shrink, W / shrink), summing to 1 over the first dimension, the background last.
    """
    covered = F.avg_pool2d(masks[None].float(), shrink)[0]
    if feather:
        covered = _blur(covered, feather)
    background = (1 - covered.sum(0)).clamp(min=0)
    # blurring leaves traces, and a background of 1e-8 would cost as much as a whole one
    background = torch.where(background < 1e-4, 0.0, background)
    weights = torch.cat([covered, background[None]])
    return weights / weights.sum(0)


def _blur(masks: Tensor, deviation: float) -> Tensor:
    reach = max(1, round(3 * deviation))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    kernel = kernel / kernel.sum()
    # beyond the canvas everything goes on as at its edge, so that what covers it whole still does
    padded = F.pad(masks[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, None, :]), kernel[None, None, :, None])[:, 0]


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin that cover a length: every ``stride``, and the last one at the end.

    Args:
        length, tile, stride: in latent pixels; ``stride`` is at most ``tile``.
    """
    if tile >= length:
        return [0]
    return [*range(0, length - tile, stride), length - tile]


def flat_window(height: int, width: int) -> Tensor:
    """Every pixel of a tile counts alike; (height, width).

    Source: MultiDiffusion (Bar-Tal et al. 2023, arXiv:2302.08113), eq. 5.
    """
    return torch.ones(height, width)


def gaussian_window(height: int, width: int) -> Tensor:
    """The middle of a tile counts most, its border least; (height, width), positive, 1 in the middle.

    Source: Mixture of Diffusers (Jimenez 2023, arXiv:2302.02412), §3.1, whose variance is 0.01 of the side's square.
    """
    sides = [torch.exp(-(((torch.arange(side) - (side - 1) / 2) / side) ** 2) / (2 * 0.01)) for side in (height, width)]
    return sides[0][:, None] * sides[1][None, :]


WINDOWS = {"multidiffusion": flat_window, "mixture": gaussian_window}
