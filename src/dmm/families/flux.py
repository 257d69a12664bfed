"""FLUX.1, dev and schnell: double and single blocks, trained by rectified flow, that read CLIP's pooled word and T5."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from dmm.families.anatomy import transformer_anatomy
from dmm.families.conditioning import read_no_size
from dmm.families.family import Component, Family, Packing, Width
from dmm.families.tokens import grid, head_width, packed, two_kinds, unpacked

GUIDANCE = 3.5
"""Scale that a guidance-distilled model is asked at where nothing else is said: its pipeline's."""


def ask_flux(flux: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Pack, place, ask, unpack: as ``FluxPipeline`` does, which tells timesteps from 0 to 1."""
    height, width = x_t.shape[-2:]
    given = dict(given)
    if flux.config.guidance_embeds:
        given.setdefault("guidance", torch.full((len(x_t),), GUIDANCE, device=x_t.device))
    else:
        given.pop("guidance", None)
    text = given["encoder_hidden_states"]
    output = flux(
        hidden_states=packed(x_t),
        timestep=timesteps.to(x_t.dtype) / 1000,
        img_ids=grid(height // 2, width // 2, 3, x_t.device),
        txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
        **given,
        return_dict=False,
    )[0]
    return unpacked(output, height, width)


FLUX_ANATOMY = transformer_anatomy(
    ask_flux,
    two_kinds,
    list_name="transformer_blocks",
    emptied=("single_transformer_blocks",),
    width=head_width,
)


def _read(pipeline: Any, tokens: Mapping[str, Tensor], _: int | None) -> dict[str, Tensor]:
    """What T5 says, and CLIP's pooled embedding."""
    clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2
    return {
        "encoder_hidden_states": t5(tokens["tokenizer_2"].to(t5.device))[0],
        "pooled_projections": clip(tokens["tokenizer"].to(clip.device)).pooler_output,
    }


def _widths(configs: Mapping[str, Any]) -> list[Width]:
    flux, clip, t5 = configs["transformer"], configs["text_encoder"], configs["text_encoder_2"]
    return [
        ("reads text of width (joint_attention_dim)", flux.joint_attention_dim, t5.d_model),
        ("reads a pooled embedding of width (pooled_projection_dim)", flux.pooled_projection_dim, clip.hidden_size),
        (
            "reads squares of latents of so many channels (in_channels)",
            flux.in_channels,
            4 * configs["vae"].latent_channels,
        ),
    ]


FLUX = Family(
    name="flux",
    title="FLUX.1",
    pipeline_class=FluxPipeline,
    pipelines={
        frozenset(): FluxPipeline,
        frozenset({"image"}): FluxImg2ImgPipeline,
        frozenset({"image", "mask"}): FluxInpaintPipeline,
    },
    components=(
        Component(
            "transformer",
            FluxTransformer2DModel,
            "model.diffusion_model.",
            "diffusion_pytorch_model",
            kohya=("lora_unet_", "lora_transformer_"),
        ),
        Component("vae", AutoencoderKL, "vae.", "diffusion_pytorch_model", layout="vae"),
        Component(
            "text_encoder",
            CLIPTextModel,
            "text_encoders.clip_l.transformer.",
            "model",
            "tokenizer",
            kohya=("lora_te1_", "lora_te_"),
            comfy=("text_encoders.clip_l.transformer.",),
        ),
        Component(
            "text_encoder_2",
            T5EncoderModel,
            "text_encoders.t5xxl.transformer.",
            "model",
            "tokenizer_2",
            num_tokens=512,
            kohya=("lora_te2_",),
        ),
    ),
    controlnet=None,
    read_tokens=_read,
    layers_left_out=0,
    read_size=read_no_size,
    prompt_arguments={"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
    port="time_text_embed.timestep_embedder.linear_2",
    owns=lambda config: "guidance_embeds" in config and "pooled_projection_dim" in config,
    markers=("double_blocks.",),
    architecture="flux-1-dev",
    v_architecture="flux-1-dev",
    kohya_name="flux1",
    authors=None,
    predicts="flow_prediction",
    hub_id="black-forest-labs/FLUX.1-dev",
    anatomy=FLUX_ANATOMY,
    density="logit_normal",
    widths=_widths,
    has_wide_states=True,
    reads_layers=False,
    takes_regions=False,
    # the others know one shift for all sizes
    samplers=("Euler",),
    patch=2,
    sample_size=128,
    packing=Packing(lambda config: int(config.in_channels) // 4, packed, unpacked),
)
