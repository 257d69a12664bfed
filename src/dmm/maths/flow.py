"""Rectified flow: noise, clean latents, and the velocity that a model predicts of them.

Everything is of the straight line from a picture to noise,

    x_t = (1 - sigma) x_0 + sigma eps,        v = d x_t / d sigma = eps - x_0,

per sample and without state. ``sigma``, (B,), is in [0, 1]; models are told 1000 sigma as their timestep.
Source: Liu et al. 2023 (arXiv:2209.03003); Esser et al. 2024 (arXiv:2403.03206).
"""

from typing import Literal

import torch
from torch import Tensor

Density = Literal["logit_normal", "uniform"]
"""How sigmas are drawn in training, before they are shifted."""


def add_noise(x_0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Go from clean latents towards noise.

    Args:
        x_0, noise: (B, C, H, W).
        sigma: (B,) in [0, 1].
    Returns: x_t, (B, C, H, W), dtype of ``x_0``.
    Source: Esser et al. 2024, eq. 13.
    """
    spread = _shaped(sigma, x_0)
    return (1 - spread) * x_0 + spread * noise


def predict_x0(velocity: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Clean latents, x_0 = x_t - sigma v; shapes as in :func:`add_noise`. They are bounded whatever sigma is."""
    return x_t - _shaped(sigma, x_t) * velocity


def predict_noise(velocity: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """Noise, eps = x_t + (1 - sigma) v; shapes as in :func:`add_noise`."""
    return x_t + (1 - _shaped(sigma, x_t)) * velocity


def rediffuse(velocity: Tensor, x_t: Tensor, sigma: Tensor, noise: Tensor, sigma_s: Tensor) -> Tensor:
    """The clean latents that a model predicts at sigma, gone towards other noise as far as sigma_s.

    Args:
        velocity, x_t, noise: (B, C, H, W).
        sigma, sigma_s: (B,) in [0, 1].
    Returns: x_s, (B, C, H, W), dtype of ``x_t``.
    """
    return add_noise(predict_x0(velocity, x_t, sigma), noise, sigma_s)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Sigmas moved towards noise, as larger pictures want them: 1 leaves them as they are.

    Source: Esser et al. 2024, eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def quantiles(num_steps: int, density: Density, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Sigmas of which a uniform draw is a draw of the density: its quantiles at (i + 1/2) / T.

    Args:
        num_steps: T.
        mean, std: of the logit, where the density is logit-normal.
    Returns: (T,) float32 in (0, 1), in order.
    Source: Esser et al. 2024, §3.1, eq. 19.
    """
    places = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
    if density == "logit_normal":
        places = (mean + std * torch.special.ndtri(places)).sigmoid()
    return places.float()


def _shaped(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
