"""SDXL and all that was made of it: Pony, Illustrious, NoobAI, Animagine."""

from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dmm.families.conditioning import read_time_ids, read_two_clips
from dmm.families.family import AuthorsLayout, Component, Family
from dmm.families.sd1 import SD1

_AUTHORS = AuthorsLayout("StableDiffusionXLDMMPipeline", "model_merge_xl", "text_time", "add_embedding2")

SDXL = Family(
    name="sdxl",
    title="SDXL",
    pipeline_class=StableDiffusionXLPipeline,
    pipelines={
        frozenset(): StableDiffusionXLPipeline,
        frozenset({"image"}): StableDiffusionXLImg2ImgPipeline,
        frozenset({"image", "mask"}): StableDiffusionXLInpaintPipeline,
        frozenset({"control"}): StableDiffusionXLControlNetPipeline,
        frozenset({"control", "image"}): StableDiffusionXLControlNetImg2ImgPipeline,
        frozenset({"control", "image", "mask"}): StableDiffusionXLControlNetInpaintPipeline,
    },
    components=(
        *SD1.components[:2],
        Component(
            "text_encoder",
            CLIPTextModel,
            "conditioner.embedders.0.transformer.",
            "model",
            "tokenizer",
            layout="clip",
            unread=("*text_projection*",),
            kohya=("lora_te1_",),
            comfy=("text_encoders.clip_l.transformer.",),
        ),
        Component(
            "text_encoder_2",
            CLIPTextModelWithProjection,
            "conditioner.embedders.1.model.",
            "model",
            "tokenizer_2",
            layout="open_clip",
            kohya=("lora_te2_",),
            comfy=("text_encoders.clip_g.transformer.",),
        ),
    ),
    controlnet=Component("controlnet", ControlNetModel, "control_model.", "diffusion_pytorch_model"),
    read_tokens=read_two_clips,
    layers_left_out=1,
    read_size=read_time_ids,
    prompt_arguments={
        "encoder_hidden_states": "prompt_embeds",
        "added_cond_kwargs.text_embeds": "pooled_prompt_embeds",
    },
    port="time_embedding.linear_2",
    owns=lambda config: config.get("addition_embed_type") in ("text_time", _AUTHORS.embed_type),
    markers=("conditioner.embedders.", "diffusion_model.label_emb.", "diffusion_model.add_embedding2."),
    architecture="stable-diffusion-xl-v1-base",
    v_architecture="stable-diffusion-xl-v1-base",
    kohya_name="sdxl_base_v1-0",
    authors=_AUTHORS,
    predicts="epsilon",
    hub_id="stabilityai/stable-diffusion-xl-base-1.0",
)
