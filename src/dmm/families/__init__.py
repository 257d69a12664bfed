"""What differs between the families of models: SD 1.x opens, the others are told apart and refused by name.

A family is told by the names of its parts and tensors, never by their widths: a narrow SD 1.x is one all the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that has weights."""

    name: str
    """Its attribute of the pipeline and its subfolder of a stock folder."""
    model_class: Any
    original_prefix: str
    """What its tensors' names begin with in a single file of the original layout."""
    weights_name: str
    """Stem of its weight files in a stock folder."""


@dataclass(frozen=True)
class Family:
    """One family whose models can be opened and merged."""

    name: str
    title: str
    """What people call it."""
    pipeline_class: Any
    components: tuple[Component, ...]
    time_embedding: str
    """Name, in the UNet, of the module that embeds time."""
    hub_id: str
    """Of the model whose configs and tokenizer a single file follows that says nothing itself: diffusers' choice."""


SD1 = Family(
    name="sd1",
    title="SD 1.x",
    pipeline_class=StableDiffusionPipeline,
    components=(
        Component("unet", UNet2DConditionModel, "model.diffusion_model.", "diffusion_pytorch_model"),
        Component("vae", AutoencoderKL, "first_stage_model.", "diffusion_pytorch_model"),
        Component("text_encoder", CLIPTextModel, "cond_stage_model.transformer.", "model"),
    ),
    time_embedding="time_embedding",
    hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
)
FAMILIES = {family.name: family for family in (SD1,)}

# the first that is found in any tensor's name tells a single file's family; the order matters where one family's
# files hold another's parts
_MARKERS = (
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("joint_blocks.", "SD 3"),
    ("double_blocks.", "FLUX"),
    ("model_embedding.weight", "a DMM merge in the authors' layout"),
    ("conditioner.embedders.", "SDXL"),
    ("diffusion_model.label_emb.", "SDXL"),
    ("cond_stage_model.model.", "SD 2.x"),
    ("model.diffusion_model.input_blocks.", SD1.title),
    ("cond_stage_model.transformer.", SD1.title),
)
# pipeline classes of stock folders, by the beginning of their names
_PIPELINES = (
    ("StableDiffusionXL", "SDXL"),
    ("StableDiffusion3", "SD 3"),
    ("Flux", "FLUX"),
    ("StableDiffusionDMM", "a DMM merge in the authors' layout"),
)


def title_of_keys(keys: Iterable[str]) -> tuple[str, str] | None:
    """Tell a single file's family.

    Args:
        keys: the names of its tensors.
    Returns: the family's title and the name that gave it away; None where no name is known.
    """
    keys = list(keys)
    for marker, title in _MARKERS:
        for key in keys:
            if marker in key:
                return title, key
    return None


def title_of_folder(class_name: str, unet_config: Mapping[str, Any]) -> str:
    """Tell a stock folder's family.

    Args:
        class_name: of its pipeline, as ``model_index.json`` has it.
        unet_config: what ``unet/config.json`` holds; empty where there is none.
    Returns: the family's title, or the class's name where the family is not one that we know.
    """
    for beginning, title in _PIPELINES:
        if class_name.startswith(beginning):
            return title
    if class_name != SD1.pipeline_class.__name__:
        return class_name
    # SD 2.x has the pipeline class of SD 1.x, but linear layers around its attention where SD 1.x convolves
    return "SD 2.x" if unet_config.get("use_linear_projection") else SD1.title
