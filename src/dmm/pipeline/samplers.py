"""What can be asked of a sampler: the samplers by the names that people know, and the range of each setting.

Nothing heavy at import, so that a wrong setting is told before anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dmm.errors import UserError

DEFAULT_SAMPLER = "DPM++ 2M"


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler and the settings that make it the sampler of that name.

    Attributes:
        scheduler: name of the class in diffusers.
        settings: what the name implies; set over the model's own scheduler config, which may come
            from another sampler that had other settings.
        timestep_spacing: how the steps are spread, unless the model asks for "trailing".
        eta: share of fresh noise in each step, of schedulers that take one.
        flow: the scheduler of that name for models of rectified flow; None where there is none.
    """

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    timestep_spacing: str = "linspace"
    eta: float = 0.0
    flow: str | None = None


_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_DPM = _SIGMAS | {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "final_sigmas_type": "zero",
}

SAMPLERS: Mapping[str, Sampler] = {
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", _DPM, flow="DPMSolverMultistepScheduler"),
    "DPM++ 2M Karras": Sampler("DPMSolverMultistepScheduler", _DPM | {"use_karras_sigmas": True}),
    "Euler": Sampler(
        "EulerDiscreteScheduler",
        _SIGMAS | {"final_sigmas_type": "zero"},
        flow="FlowMatchEulerDiscreteScheduler",
    ),
    "Euler a": Sampler("EulerAncestralDiscreteScheduler"),
    # diffusers clips to [-1, 1] unless told not to: right for pixels, ruinous for latents
    "DDIM": Sampler("DDIMScheduler", {"clip_sample": False}, timestep_spacing="leading"),
    "UniPC": Sampler(
        "UniPCMultistepScheduler",
        _SIGMAS | {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"},
        flow="UniPCMultistepScheduler",
    ),
    # for models, or LoRAs, that were distilled to paint in a few steps
    "LCM": Sampler("LCMScheduler", {"clip_sample": False}, timestep_spacing="leading"),
    # gamma of the paper (arXiv:2402.19159), at the value that its authors and diffusers recommend
    "TCD": Sampler("TCDScheduler", {"clip_sample": False}, timestep_spacing="leading", eta=0.3),
}


def check_settings(*, steps: int, guidance_scale: float, negative_prompt: str) -> None:
    """Check what can be checked without the model.

    Raises: UserError: a setting is out of range, or would have no effect.
    """
    if steps < 1:
        raise UserError(f"The number of steps must be at least 1, not {steps}.")
    if not 1 <= guidance_scale < float("inf"):
        raise UserError(f"The guidance scale must be at least 1 (no guidance), not {guidance_scale:g}.")
    if negative_prompt and guidance_scale == 1:
        raise UserError(
            "A negative prompt has no effect at a guidance scale of 1: raise the one or leave out the other."
        )


def check_multiple(name: str, size: int, step: int) -> None:
    """Check that a width or height in pixels suits the model.

    Raises: UserError: ``size`` is not a positive multiple of ``step``; the nearest that are, are named.
    """
    if size > 0 and size % step == 0:
        return
    below = size // step * step
    near = f"{below} and {below + step} are the nearest" if below > 0 else f"{step} is the nearest"
    raise UserError(f"The {name} must be a multiple of {step} pixels, not {size}; {near}.")
