"""What differs between the families of models, one file a family; nothing outside of this package names one.

A family is told by the names of its parts and tensors, never by their widths: a narrow model is one of its family all
the same. :data:`FAMILIES` holds those that open; the others are told apart and refused by name.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.families.anatomy import UNET, Anatomy
from dmm.families.conditioning import Frame, arguments
from dmm.families.family import Component, Family
from dmm.families.flux import FLUX
from dmm.families.sd1 import SD1
from dmm.families.sd2 import SD2
from dmm.families.sd3 import SD3
from dmm.families.sdxl import SDXL
from dmm.families.strangers import GUIDANCE_MARKERS, LIKELY_LORA_MARKERS, STRANGERS, SURE_LORA_MARKERS, Stranger
from dmm.families.z_image import Z_IMAGE

__all__ = [
    "FAMILIES",
    "STRANGERS",
    "Component",
    "Family",
    "Frame",
    "Stranger",
    "anatomy_of",
    "arguments",
    "ask",
    "components_of",
    "denoiser_names",
    "denoiser_of",
    "family_of",
    "family_of_class",
    "family_of_controlnet",
    "family_of_names",
    "guidance_name",
    "known_titles",
    "set_denoiser",
    "text_encoders_of",
    "title_of_lora",
    "transformer_of",
]

FAMILIES = {family.name: family for family in (SD1, SD2, SDXL, SD3, FLUX, Z_IMAGE)}


def family_of_names(names: Iterable[str]) -> tuple[Family | Stranger, str] | None:
    """Tell a single file's family.

    Args:
        names: of its tensors.
    Returns: the family and the name that gave it away; None where no name is known.
    """
    names = list(names)
    # strangers first, then the youngest: their files hold the older families' parts too
    known: list[Family | Stranger] = [*STRANGERS, *reversed(FAMILIES.values())]
    for family in known:
        for marker in family.markers:
            for name in names:
                if marker in name:
                    return family, name
    return None


def family_of_class(pipeline: str, configs: Mapping[str, Mapping[str, Any]]) -> Family | Stranger:
    """Tell a stock folder's family.

    Args:
        pipeline: the name of its class, as ``model_index.json`` has it.
        configs: of the components that it names, by their names; empty where that is missing.
    Returns: the family, whatever its pipeline begins with or is guided by; a stranger of the class's name where it is
        not one that we know.
    """
    for stranger in STRANGERS:  # first: they have the classes of families
        if stranger.pipeline and pipeline.startswith(stranger.pipeline) and stranger.owns(configs):
            return stranger
    for family in FAMILIES.values():
        if pipeline in family.class_names and family.owns(configs.get(family.denoiser.name, {})):
            return family
    return Stranger(pipeline)


def family_of(pipeline: Any) -> Family:
    """The family of an open pipeline, whatever it does: pipelines that begin with an image are of the same one.

    Raises: UserError: none that we know.
    """
    found = [
        family
        for family in FAMILIES.values()
        if all(one.optional or getattr(pipeline, one.name, None) is not None for one in family.components)
        and family.owns(getattr(pipeline, family.denoiser.name).config)
    ]
    for family in found:
        if type(pipeline) is family.pipeline_class:
            return family
    if not found:
        raise UserError(f"A {type(pipeline).__name__} cannot be used: {known_titles()} was expected.")
    return found[0]


def family_of_controlnet(config: Mapping[str, Any]) -> Family | None:
    """The family of the models that a ControlNet guides, by its config; None of what is no ControlNet that we know."""
    for family in FAMILIES.values():
        known = family.controlnet
        if known and config.get("_class_name") == known.model_class.__name__ and family.owns(config):
            return family
    return None


def _stem(architecture: str) -> list[str]:
    # the size, or the part of a pipeline, that comes behind says nothing of the family
    return architecture.split("/")[0].split("-")[:3]


def title_of_lora(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """What a LoRA says that it is of, for people; None where nothing tells.

    Args:
        names: of its layers.
        metadata: of its header, in the words of kohya's scripts and of modelspec.
    """
    names = list(names)
    for title, marker in SURE_LORA_MARKERS:
        if any(marker in name for name in names):
            return title
    architecture, version = metadata.get("modelspec.architecture", ""), metadata.get("ss_base_model_version", "")
    for family in FAMILIES.values():
        if version.startswith(family.kohya_name):
            return family.title
    known: list[Family | Stranger] = [*FAMILIES.values(), *STRANGERS]
    for one in known:
        # the size, or the part of a pipeline, that comes behind says nothing of the family
        if (
            one.architecture != "unknown"
            and architecture.split("/")[0].split("-")[:3] == one.architecture.split("-")[:3]
        ):
            return one.title
    return next((title for title, marker in LIKELY_LORA_MARKERS if any(marker in name for name in names)), None)


def transformer_of(family: Family | Stranger) -> str | None:
    """What diffusers calls a family's transformer, whose single files hold nothing else; None of other families."""
    if isinstance(family, Stranger):
        return family.transformer
    return None if family.denoiser.layout else family.denoiser.model_class.__name__


def guidance_name(names: Iterable[str]) -> str | None:
    """The tensor, among those of these names, that shows a guidance embedding: of FLUX.1 dev, not of schnell."""
    return next((name for name in names if any(part in name for part in GUIDANCE_MARKERS)), None)


def denoiser_of(pipeline: Any) -> Any:
    """What an open pipeline denoises with: its UNet, or whatever its family calls it."""
    return getattr(pipeline, family_of(pipeline).denoiser.name)


def denoiser_names() -> list[str]:
    """What families call what they denoise with, each name once."""
    return list(dict.fromkeys(family.denoiser.name for family in FAMILIES.values()))


def anatomy_of(denoiser: Any) -> Anatomy:
    """How a denoiser is asked: as its class's family has it; ControlNets, and other modules, as UNets are."""
    found = (family.anatomy for family in FAMILIES.values() if isinstance(denoiser, family.denoiser.model_class))
    return next(found, UNET)


def ask(
    denoiser: Any,
    x_t: Tensor,
    timesteps: Tensor,
    conditioning: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What a denoiser predicts.

    Args:
        x_t: (B, C, H, W).
        timesteps: (B,), from 0 to 1000.
        conditioning: what it reads, by flat names.
        dtype: that it is asked in, by default in that of ``x_t`` and of what it reads.
    Returns: (B, C, H, W).
    """
    given = arguments(conditioning, dtype)
    return anatomy_of(denoiser).ask(denoiser, x_t if dtype is None else x_t.to(dtype), timesteps, given)


def text_encoders_of(pipeline: Any) -> list[Any]:
    """What reads an open pipeline's prompts."""
    return [getattr(pipeline, one.name) for one in components_of(pipeline) if one.tokenizer]


def components_of(pipeline: Any) -> tuple[Component, ...]:
    """The parts with weights that an open pipeline has."""
    family = family_of(pipeline)
    return family.present({one.name for one in family.components if getattr(pipeline, one.name, None) is not None})


def set_denoiser(pipeline: Any, denoiser: Any) -> None:
    """Give an open pipeline another denoiser of its family."""
    setattr(pipeline, family_of(pipeline).denoiser.name, denoiser)


def known_titles() -> str:
    """The families that open, for people."""
    *others, last = (family.title for family in FAMILIES.values())
    return f"{', '.join(others)} or {last}"
