"""Few-step distillation: points of a teacher's path, and the function that leads from each of them to its end.

A frozen teacher walks the probability flow by DDIM from a timestep t to an earlier one s; the student learns a function
f that has one value on all of the path, so that one step from anywhere on it leads to its end. As in
:mod:`dmm.maths.diffusion`, signal power ``alpha_bar`` is given per sample, (B,), and nothing has state.

Sources: latent consistency models, LCM (Luo et al. 2023, arXiv:2310.04378); the sub-path linear approximation model,
SPLAM (Xu et al. 2024, arXiv:2404.13903), of which LCM is the case gamma = 1.
"""

import math

import torch
from torch import Tensor

from dmm.maths.diffusion import PredictionType, convert_prediction, predict_x0

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""Both as samplers of such models have them: what is trained with others is painted wrongly."""
MOST_ANGLE = 10.0
"""In radians, of gamma = 0 at the highest frequency that it is embedded by."""


def path_timesteps(num_timesteps: int, skip: int) -> Tensor:
    """The points of the teacher's path, (num_timesteps // skip,) int64, increasing: skip - 1, 2 skip - 1 and so on."""
    return torch.arange(1, num_timesteps // skip + 1) * skip - 1


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: Tensor) -> Tensor:
    """Classifier-free guidance.

    Args:
        conditional, unconditional: (B, C, H, W), what is predicted with the caption and with the empty one.
        guidance_scale: (B,); 1 is none.
    Source: Ho & Salimans 2022, arXiv:2207.12598.
    """
    return unconditional + _like(guidance_scale, conditional) * (conditional - unconditional)


def clean_and_noise(
    model_output: Tensor, x_t: Tensor, alpha_bar_t: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """What a model's prediction says of clean latents and noise, each (B, C, H, W).

    From them a step of DDIM without fresh noise is :func:`dmm.maths.diffusion.add_noise` at the earlier timestep.

    Args:
        model_output, x_t: (B, C, H, W).
        alpha_bar_t: (B,) in (0, 1]; of velocities, 0 too.
    Raises: ValueError: the model predicts epsilon, and alpha_bar_t is 0.
    Source: Song et al. 2021, arXiv:2010.02502, eq. 12 with sigma = 0.
    """
    noise = convert_prediction(model_output, x_t, alpha_bar_t, prediction_type, "epsilon")
    if prediction_type == "epsilon":
        return predict_x0(noise, x_t, alpha_bar_t), noise
    signal, spread = _roots(alpha_bar_t, x_t)
    return signal * x_t - spread * model_output, noise


def sub_path_point(x_t: Tensor, x_s: Tensor, gamma: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """A point between two of the teacher's path, (B, C, H, W).

    Args:
        x_t: where the teacher's step begins, (B, C, H, W).
        x_s: where it ends, at a timestep s < t.
        gamma: (B,) in [0, 1]; 1 is x_t, 0 is x_s with the signal of x_t.
    Source: SPLAM, the sub-path of its linear ODE.
    """
    ratio = _like((alpha_bar_t / alpha_bar_s).sqrt(), x_t)
    weight = _like(gamma, x_t)
    return (1 - weight) * ratio * x_s + weight * x_t


def sub_path_noise(gamma: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """The power of the noise in :func:`sub_path_point`, whose signal power is ``alpha_bar_t``; (B,).

    Source: SPLAM: s_gamma^2 = (sigma_s alpha_t / alpha_s)^2 + gamma^2 (1 - (alpha_t / alpha_s)^2).
    """
    ratio = alpha_bar_t / alpha_bar_s
    return (1 - alpha_bar_s) * ratio + gamma.square() * (1 - ratio)


def sub_path_x0(
    model_output: Tensor, x_gamma: Tensor, alpha_bar_t: Tensor, noise_power: Tensor, prediction_type: PredictionType
) -> Tensor:
    """Clean latents from what a model predicts of a sub-path's point, (B, C, H, W).

    Of velocities SPLAM does not speak: they are taken of the point as it would be at the variance of 1 that they are
    defined at, which at gamma = 1 it has.

    Args:
        model_output, x_gamma: (B, C, H, W).
        alpha_bar_t: (B,), signal power; of epsilon, above 0.
        noise_power: (B,), of :func:`sub_path_noise`.
    Source: SPLAM: x_0 = (x_gamma - s_gamma eps) / alpha_t.
    """
    signal, spread = (_like(power.sqrt(), x_gamma) for power in (alpha_bar_t, noise_power))
    if prediction_type == "epsilon":
        return (x_gamma - spread * model_output) / signal
    power = _like((alpha_bar_t + noise_power).clamp(min=1e-12), x_gamma)
    return (signal * x_gamma - spread * power.sqrt() * model_output) / power


def consistent(x_0: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
    """The consistency function f, which at t = 0 is x_t whatever is predicted; (B, C, H, W).

    Args:
        x_0: what is predicted of clean latents, (B, C, H, W).
        x_t: that it is predicted from.
        timesteps: (B,).
    Source: LCM eq. 9, with the scalings of its code: c_skip = sigma^2 / (t'^2 + sigma^2) and c_out = t' / sqrt(t'^2 +
        sigma^2), where t' = 10 t and sigma = 0.5.
    """
    scaled = TIMESTEP_SCALING * timesteps.to(torch.float32)
    total = scaled.square() + SIGMA_DATA**2
    c_skip, c_out = SIGMA_DATA**2 / total, scaled / total.sqrt()
    return _like(c_skip, x_t) * x_t + _like(c_out, x_t) * x_0


def embed_gamma(gamma: Tensor, dim: int) -> Tensor:
    """Sines and cosines of where on a sub-path a sample is, less those of its beginning; (B, dim) float32.

    At gamma = 1 all are 0, so that where paths begin, which is where samplers are, a linear layer of them says nothing.
    SPLAM's code embeds 10 (1 - gamma) as LCM does guidance, a thousand times as fast: there a neighbour's embedding
    says nothing of the one at gamma = 1, which is every target's and is never drawn.

    Args:
        gamma: (B,) in [0, 1].
        dim: even; half are sines.
    """
    angles = MOST_ANGLE * (1 - gamma.to(torch.float32))[:, None] * _frequencies(dim, gamma.device)
    return torch.cat([angles.sin(), angles.cos() - 1], dim=1)


def embed_guidance(guidance_scale: Tensor, dim: int) -> Tensor:
    """Sines and cosines of guidance; (B, dim) float32.

    Args:
        guidance_scale: (B,); 1 is none.
        dim: even; half are sines.
    Source: as stock pipelines embed guidance for LCM, after the code of VDM (Kingma et al. 2021, arXiv:2107.00630).
    """
    angles = 1000.0 * (guidance_scale.to(torch.float32) - 1)[:, None] * _frequencies(dim, guidance_scale.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _frequencies(dim: int, device: torch.device) -> Tensor:
    half = dim // 2
    return torch.exp(torch.arange(half, device=device) * -(math.log(10_000.0) / (half - 1)))[None]


def _roots(power: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return _like(power.sqrt(), x), _like((1 - power).sqrt(), x)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Values by sample, shaped to multiply ``x``, in its dtype."""
    return values.reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
