"""Families, and other files, that are told apart from those that open, to be refused by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stranger:
    """What does not open."""

    title: str
    """What people call it."""
    markers: tuple[str, ...] = ()
    """Parts of tensors' names that tell a single file."""
    pipeline: str | None = None
    """What the pipeline classes of its folders begin with."""
    architecture: str = "unknown"
    """What ``modelspec.architecture`` calls it."""
    predicts: str | None = "epsilon"
    """See :attr:`dmm.families.Family.predicts`."""
    transformer: str | None = None
    """Of models whose single files hold a transformer alone: what diffusers calls its class."""
    owns: Callable[[Mapping[str, Mapping[str, Any]]], bool] = lambda _: True
    """Whether a folder of such a class is of this kind, by the configs of its parts."""

    def architecture_of(self, _: str | None) -> str:
        """See :meth:`dmm.families.Family.architecture_of`."""
        return self.architecture


GUIDANCE_MARKERS = ("guidance_in.", "guidance_embedder.")
"""Parts of tensors' names that only transformers have which were distilled to read a guidance scale."""

SURE_LORA_MARKERS = (
    ("SDXL", "lora_te2_"),
    ("SDXL", "text_encoder_2."),
    ("SDXL", "clip_g."),
    ("FLUX", "double_blocks"),
    ("SD 3", "joint_blocks"),
)
"""Titles of families, and parts of the names of LoRAs' layers that only theirs have, whatever their metadata say."""

LIKELY_LORA_MARKERS = (
    ("SDXL", "unet_input_blocks_"),
    ("SD 1.x or SD 2.x", "lora_te_"),
    ("SD 1.x or SD 2.x", "down_blocks_0_attentions"),
    ("SD 1.x or SD 2.x", "down_blocks.0.attentions"),
)
"""The same of parts that tell where nothing else does."""

STRANGERS = (
    Stranger("a ControlNet", ("control_model.", "controlnet_")),
    # those first that have the names of FLUX.1, too
    Stranger(
        "FLUX.2",
        ("double_stream_modulation_img.",),
        "Flux2",
        architecture="flux-2",
        predicts=None,
        transformer="Flux2Transformer2DModel",
    ),
    Stranger(
        "Chroma",
        ("distilled_guidance_layer.",),
        "Chroma",
        architecture="chroma",
        predicts=None,
        transformer="ChromaTransformer2DModel",
    ),
    Stranger(
        "Qwen-Image",
        (".img_mod.1.",),
        "QwenImage",
        architecture="qwen-image",
        predicts=None,
        transformer="QwenImageTransformer2DModel",
    ),
    Stranger(
        "Anima or Cosmos",
        ("net.blocks.0.",),
        "Cosmos",
        predicts=None,
        transformer="CosmosTransformer3DModel",
    ),
    Stranger(
        "Lumina 2",
        ("cap_embedder.",),
        "Lumina2",
        predicts=None,
        transformer="Lumina2Transformer2DModel",
    ),
    Stranger("a DMM merge in the authors' layout", ("model_embedding.weight",), "StableDiffusionDMM"),
    Stranger(
        "the SDXL refiner",
        # its only text encoder is the second of SDXL, and stands where SDXL has its first
        ("conditioner.embedders.0.model.",),
        "StableDiffusionXL",
        architecture="stable-diffusion-xl-v1-refiner",
        owns=lambda configs: "text_encoder_2" in configs and "text_encoder" not in configs,
    ),
)
