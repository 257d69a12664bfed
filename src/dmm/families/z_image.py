"""Z-Image and Z-Image-Turbo: one stream of tokens, trained by rectified flow, that reads a language model (Qwen3)."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import Qwen3Model

from dmm.families.anatomy import Block, every_fourth, transformer_anatomy
from dmm.families.conditioning import read_no_size
from dmm.families.family import Component, Family, Width
from dmm.families.tokens import ahead_of_text, remember_count

PATCH = 2


def ask_z_image(z_image: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Ask as ``ZImagePipeline`` does: pictures and captions as lists, time from noise to picture, the sign turned.

    Args:
        given: ``cap_feats`` (B, T, D), of which the first ``lengths_ids`` (B,) are a caption's.
    """
    height, width = x_t.shape[-2:]
    remember_count(z_image, (height // PATCH) * (width // PATCH))
    captions = list(given["cap_feats"].unbind())
    if not x_t.is_meta:  # where only shapes are asked about, captions are as long as they may be
        captions = [one[: int(n)] for one, n in zip(captions, given["lengths_ids"].tolist(), strict=True)]
    pictures = list(x_t.unsqueeze(2).unbind())
    output = z_image(pictures, (1000 - timesteps) / 1000, captions, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def _blocks(z_image: Any) -> dict[str, Block]:
    pick = ahead_of_text(z_image)
    return {
        **every_fourth(z_image.noise_refiner, "noise_refiner", pick),
        **every_fourth(z_image.layers, "layers", pick),
    }


Z_IMAGE_ANATOMY = transformer_anatomy(
    ask_z_image,
    _blocks,
    list_name="layers",
    pick_in=ahead_of_text,
    width=lambda z_image: int(z_image.config.dim),
)


def _asked(tokenizer: Any, prompt: str) -> str:
    """A prompt as what a user says in a chat, as the pipeline has it."""
    said = [{"role": "user", "content": prompt}]
    asked: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return asked


def _read(pipeline: Any, tokens: Mapping[str, Tensor], _: int | None) -> dict[str, Tensor]:
    """The last layer but one of the language model, and how much of it is a prompt's; the rest is zeros."""
    encoder, mask = pipeline.text_encoder, tokens["tokenizer_mask"].to(pipeline.text_encoder.device).bool()
    read = None if mask.is_meta else mask  # where only shapes are asked about, none can be looked at
    said = encoder(tokens["tokenizer"].to(encoder.device), attention_mask=read, output_hidden_states=True)
    states = said.hidden_states[-2]
    # a prompt's tokens first, on whichever side the tokenizer pads
    order = mask.int().argsort(dim=1, descending=True, stable=True)[..., None].expand_as(states)
    ahead = (states * mask[..., None]).gather(1, order)
    return {"cap_feats": ahead, "lengths_ids": mask.sum(1)}


def _widths(configs: Mapping[str, Any]) -> list[Width]:
    z_image, text = configs["transformer"], configs["text_encoder"]
    return [
        ("reads text of width (cap_feat_dim)", z_image.cap_feat_dim, text.hidden_size),
        ("reads latent channels (in_channels)", z_image.in_channels, configs["vae"].latent_channels),
    ]


Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    pipeline_class=ZImagePipeline,
    pipelines={
        frozenset(): ZImagePipeline,
        frozenset({"image"}): ZImageImg2ImgPipeline,
        frozenset({"image", "mask"}): ZImageInpaintPipeline,
    },
    components=(
        Component(
            "transformer",
            ZImageTransformer2DModel,
            "model.diffusion_model.",
            "diffusion_pytorch_model",
            kohya=("lora_unet_", "lora_transformer_"),
        ),
        Component("vae", AutoencoderKL, "vae.", "diffusion_pytorch_model", layout="vae"),
        Component(
            "text_encoder",
            Qwen3Model,
            "text_encoders.qwen3_4b.transformer.",
            "model",
            "tokenizer",
            num_tokens=512,
            template=_asked,
            kohya=("lora_te_",),
        ),
    ),
    controlnet=None,
    read_tokens=_read,
    layers_left_out=0,
    read_size=read_no_size,
    prompt_arguments={"cap_feats": "prompt_embeds"},
    port="t_embedder.mlp.2",
    owns=lambda config: "cap_feat_dim" in config and "all_patch_size" in config,
    markers=("cap_pad_token",),
    architecture="z-image",
    v_architecture="z-image",
    kohya_name="zimage",
    authors=None,
    predicts="flow_prediction",
    hub_id="Tongyi-MAI/Z-Image",
    anatomy=Z_IMAGE_ANATOMY,
    density="logit_normal",
    widths=_widths,
    samplers=("Euler",),
    has_wide_states=True,
    reads_layers=False,
    takes_regions=False,
    keeps_rows=False,
    patch=PATCH,
    sample_size=128,
)
