"""SD 3 and 3.5: a transformer of joint blocks, trained by rectified flow, that reads two CLIPs and perhaps T5."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from dmm.families.anatomy import every_fourth, transformer_anatomy
from dmm.families.conditioning import read_no_size
from dmm.families.family import Component, Family, Width

_T5_TOKENS = 256
"""What the pipeline gives T5 to read, and the zeros that it puts where T5 is left out."""


def _ask(transformer: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
    velocity: Tensor = transformer(x_t, timestep=timesteps, **given, return_dict=False)[0]
    return velocity


def _read(pipeline: Any, tokens: Mapping[str, Tensor], clip_skip: int | None) -> dict[str, Tensor]:
    """The last layers but one of two CLIPs side by side, then what T5 says; and both CLIPs' pooled embeddings."""
    said = [
        encoder(tokens[tokenizer].to(encoder.device), output_hidden_states=True)
        for tokenizer, encoder in (("tokenizer", pipeline.text_encoder), ("tokenizer_2", pipeline.text_encoder_2))
    ]
    layer = -((clip_skip or 0) + 2)
    clips = torch.cat([one.hidden_states[layer] for one in said], -1)
    width, t5 = pipeline.transformer.config.joint_attention_dim, getattr(pipeline, "text_encoder_3", None)
    none = clips.new_zeros(len(clips), _T5_TOKENS, width)
    last = none if t5 is None else t5(tokens["tokenizer_3"].to(t5.device))[0]
    return {
        "encoder_hidden_states": torch.cat([F.pad(clips, (0, width - clips.shape[-1])), last], -2),
        "pooled_projections": torch.cat([one.text_embeds for one in said], -1),
    }


def _widths(configs: Mapping[str, Any]) -> list[Width]:
    transformer, clips = configs["transformer"], [configs["text_encoder"], configs["text_encoder_2"]]
    pooled = sum(one.projection_dim for one in clips)
    widths = [
        ("reads a pooled embedding of width (pooled_projection_dim)", transformer.pooled_projection_dim, pooled),
        ("reads latent channels (in_channels)", transformer.in_channels, configs["vae"].latent_channels),
    ]
    if "text_encoder_3" in configs:
        text = ("reads text of width (joint_attention_dim)", transformer.joint_attention_dim)
        widths.append((*text, configs["text_encoder_3"].d_model))
    return widths


SD3 = Family(
    name="sd3",
    title="SD 3",
    pipeline_class=StableDiffusion3Pipeline,
    pipelines={
        frozenset(): StableDiffusion3Pipeline,
        frozenset({"image"}): StableDiffusion3Img2ImgPipeline,
    },
    components=(
        Component(
            "transformer",
            SD3Transformer2DModel,
            "model.diffusion_model.",
            "diffusion_pytorch_model",
            kohya=("lora_unet_", "lora_transformer_"),
        ),
        Component("vae", AutoencoderKL, "first_stage_model.", "diffusion_pytorch_model", layout="vae"),
        Component(
            "text_encoder",
            CLIPTextModelWithProjection,
            "text_encoders.clip_l.transformer.",
            "model",
            "tokenizer",
            kohya=("lora_te1_",),
            comfy=("text_encoders.clip_l.transformer.",),
        ),
        Component(
            "text_encoder_2",
            CLIPTextModelWithProjection,
            "text_encoders.clip_g.transformer.",
            "model",
            "tokenizer_2",
            kohya=("lora_te2_",),
            comfy=("text_encoders.clip_g.transformer.",),
        ),
        Component(
            "text_encoder_3",
            T5EncoderModel,
            "text_encoders.t5xxl.transformer.",
            "model",
            "tokenizer_3",
            optional=True,
            num_tokens=_T5_TOKENS,
            kohya=("lora_te3_",),
        ),
    ),
    controlnet=None,
    read_tokens=_read,
    layers_left_out=1,
    read_size=read_no_size,
    prompt_arguments={"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
    port="time_text_embed.timestep_embedder.linear_2",
    owns=lambda config: "pos_embed_max_size" in config,
    markers=("joint_blocks.",),
    architecture="stable-diffusion-v3-medium",
    v_architecture="stable-diffusion-v3-medium",
    kohya_name="sd3",
    authors=None,
    predicts="flow_prediction",
    hub_id="stabilityai/stable-diffusion-3.5-medium",
    anatomy=transformer_anatomy(
        _ask,
        lambda transformer: every_fourth(transformer.transformer_blocks, "transformer_blocks"),
        list_name="transformer_blocks",
        width=lambda transformer: int(transformer.inner_dim),
    ),
    density="logit_normal",
    widths=_widths,
)
