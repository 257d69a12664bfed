"""The diffusion process: noise, clean latents and what a denoiser may predict of them.

Everything is of the variance-preserving process of DMM eq. 6,

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,

per sample and without state. ``alpha_bar_t``, (B,), is the cumulative signal power at each sample's
timestep: ``alphas_cumprod[timesteps]``.
"""

from typing import Literal

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction"]
"""What models predict; the last is the velocity of :mod:`dmm.maths.flow`, which nothing here converts."""


def add_noise(x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Diffuse clean latents to timestep t.

    Args:
        x_0, noise: (B, C, H, W).
        alpha_bar_t: (B,) in [0, 1].
    Returns: x_t, (B, C, H, W), dtype of ``x_0``.
    Source: DMM eq. 6.
    """
    signal, spread = _factors(x_0, alpha_bar_t)
    return signal * x_0 + spread * noise


def predict_x0(noise_pred: Tensor, x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Recover clean latents from predicted noise.

    Args:
        noise_pred, x_t: (B, C, H, W).
        alpha_bar_t: (B,) in (0, 1].
    Returns: x_0, (B, C, H, W), dtype of ``x_t``.
    Raises: ValueError: alpha_bar_t is 0 (a zero-SNR step), where x_0 is undefined.
    Source: DMM eq. 12.
    """
    if (alpha_bar_t == 0).any():
        raise ValueError("x_0 is undefined where alpha_bar_t is 0: nothing of it is left in x_t.")
    signal, spread = _factors(x_t, alpha_bar_t)
    return (x_t - spread * noise_pred) / signal


def epsilon_to_velocity(noise_pred: Tensor, x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Velocity, v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0, from noise; shapes as in :func:`predict_x0`.

    Raises: ValueError: alpha_bar_t is 0, where noise does not determine velocity.
    Source: Salimans & Ho 2022, appendix D.
    """
    signal, spread = _factors(x_t, alpha_bar_t)
    return signal * noise_pred - spread * predict_x0(noise_pred, x_t, alpha_bar_t)


def velocity_to_epsilon(velocity: Tensor, x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Noise, eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t, from velocity; shapes as in :func:`predict_x0`.

    Source: Salimans & Ho 2022, appendix D.
    """
    signal, spread = _factors(x_t, alpha_bar_t)
    return signal * velocity + spread * x_t


def convert_prediction(
    model_output: Tensor, x_t: Tensor, alpha_bar_t: Tensor, source: PredictionType, target: PredictionType
) -> Tensor:
    """What a model of ``source`` type predicts, as one of ``target`` type would have said it.

    Args:
        model_output, x_t: (B, C, H, W).
        alpha_bar_t: (B,) in (0, 1].
    Returns: (B, C, H, W); ``model_output`` itself where the types agree.
    Raises: ValueError: the source is epsilon, the target velocity, and alpha_bar_t is 0.
    """
    if source == target:
        return model_output
    convert = epsilon_to_velocity if source == "epsilon" else velocity_to_epsilon
    return convert(model_output, x_t, alpha_bar_t)


def rediffuse(
    model_output: Tensor,
    x_t: Tensor,
    alpha_bar_t: Tensor,
    noise: Tensor,
    alpha_bar_s: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """The clean latents that a model predicts at timestep t, diffused again with other noise to a timestep s >= t.

    At large t the clean latents themselves are unbounded: an error of the predicted noise comes back
    sqrt((1 - alpha_bar_t) / alpha_bar_t) times as large, about 15 at the end of the commonest schedule. Diffused to s
    they are multiplied by sqrt(alpha_bar_s), and what is left of that factor is at most 1.

    Args:
        model_output, x_t, noise: (B, C, H, W).
        alpha_bar_t: (B,) in [0, 1].
        alpha_bar_s: (B,) in [0, alpha_bar_t].
    Returns: x_s, (B, C, H, W), dtype of ``x_t``.
    Source: DMM eq. 12 and §A.2, "we diffuse the discriminator input images with random noise".
    """
    signal, spread = _factors(x_t, alpha_bar_t)
    signal_s, spread_s = _factors(x_t, alpha_bar_s)
    if prediction_type == "v_prediction":
        return signal_s * (signal * x_t - spread * model_output) + spread_s * noise
    # nothing of x_0 is left at s where nothing of it is left at t
    ratio = signal_s / signal.clamp(min=1e-6)
    return ratio * (x_t - spread * model_output) + spread_s * noise


def _factors(x: Tensor, alpha_bar_t: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of signal and noise power, shaped to multiply ``x``; in its dtype, taken in the schedule's."""
    power = alpha_bar_t.reshape(-1, *(1,) * (x.ndim - 1))
    return power.sqrt().to(x.dtype), (1 - power).sqrt().to(x.dtype)
