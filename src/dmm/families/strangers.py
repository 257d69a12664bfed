"""Families, and other files, that are told apart from those that open, to be refused by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dmm.families.family import AuthorsLayout


@dataclass(frozen=True)
class Stranger:
    """What does not open."""

    title: str
    """What people call it."""
    markers: tuple[str, ...] = ()
    """Parts of tensors' names that tell a single file."""
    pipeline: str | None = None
    """What the pipeline classes of its folders begin with."""
    authors: AuthorsLayout | None = None
    architecture: str = "unknown"
    """What ``modelspec.architecture`` calls it."""
    owns: Callable[[Mapping[str, Any]], bool] = lambda _: True
    """Whether a denoiser of this config is one of the family's."""


LORA_MARKERS = (("SDXL", "lora_te2_"), ("SDXL", "text_encoder_2."), ("SDXL", "input_blocks"))
"""Titles of families, and parts of the names of LoRAs' layers that only theirs have."""

STRANGERS = (
    Stranger("a ControlNet", ("control_model.", "controlnet_")),
    Stranger("SD 3", ("joint_blocks.",), "StableDiffusion3", architecture="stable-diffusion-v3"),
    Stranger("FLUX", ("double_blocks.",), "Flux", architecture="flux-1"),
    Stranger("a DMM merge in the authors' layout", ("model_embedding.weight",), "StableDiffusionDMM"),
    Stranger(
        "SDXL",
        ("conditioner.embedders.", "diffusion_model.label_emb.", "diffusion_model.add_embedding2."),
        "StableDiffusionXL",
        AuthorsLayout("StableDiffusionXLDMMPipeline", "model_merge_xl"),
        "stable-diffusion-xl-v1-base",
    ),
    Stranger(
        "SD 2.x",
        ("cond_stage_model.model.",),
        "StableDiffusionPipeline",
        architecture="stable-diffusion-v2-512",
        # the pipeline class of SD 1.x, but linear layers around its attention where SD 1.x convolves
        owns=lambda config: bool(config.get("use_linear_projection")),
    ),
)
