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

    DDIM without fresh noise leads x_t to x_s along one noise, so that amounts of it add up. SPLAM adds up powers, as of
    independent noises, (sigma_s alpha_t / alpha_s)^2 + gamma^2 (1 - (alpha_t / alpha_s)^2): the same at both ends, and
    less between them than there is, by what its student first has to exaggerate.

    Source: SPLAM's x_gamma of x_t = alpha_t x_0 + sigma_t eps and x_s = alpha_s x_0 + sigma_s eps.
    """
    ratio, sigma_s, sigma_t = (alpha_bar_t / alpha_bar_s).sqrt(), (1 - alpha_bar_s).sqrt(), (1 - alpha_bar_t).sqrt()
    return ((1 - gamma) * ratio * sigma_s + gamma * sigma_t).square()


def as_noised(x_gamma: Tensor, alpha_bar_t: Tensor, noise_power: Tensor) -> tuple[Tensor, Tensor]:
    """A sub-path's point as a diffusion model knows noised latents, at a variance of 1; and its signal power there.

    Clean latents from a prediction of it are SPLAM's, (x_gamma - s_gamma eps) / alpha_t.

    Args:
        x_gamma: (B, C, H, W).
        alpha_bar_t: (B,), its signal power as it is.
        noise_power: (B,), of :func:`sub_path_noise`; both are not 0.
    """
    power = alpha_bar_t + noise_power
    return x_gamma / _like(power.sqrt(), x_gamma), alpha_bar_t / power


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


def embed_guidance(guidance_scale: Tensor, dim: int) -> Tensor:
    """Sines and cosines of guidance; (B, dim) float32.

    Args:
        guidance_scale: (B,); 1 is none.
        dim: even; half are sines.
    Source: as stock pipelines embed guidance for LCM, after the code of VDM (Kingma et al. 2021, arXiv:2107.00630).
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=guidance_scale.device) * -(math.log(10_000.0) / (half - 1)))
    angles = 1000.0 * (guidance_scale.to(torch.float32) - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def steps_to_pass(num_points: int, ema_decay: float | None) -> float:
    """Training steps until what the student learns at a path's end has passed to its beginning.

    At every point the student imitates its own running average one point further on, and that follows it in
    1 / (1 - decay) steps: in a shorter training the beginning, where few-step pictures begin, learns of nothing.

    Args:
        num_points: of the teacher's path.
        ema_decay: of the average, in (0, 1); None where the student imitates itself.
    """
    return num_points / (1 - (ema_decay or 0))


def _roots(power: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return _like(power.sqrt(), x), _like((1 - power).sqrt(), x)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Values by sample, shaped to multiply ``x``, in its dtype."""
    return values.reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
