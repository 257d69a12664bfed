"""SDXL and all that was made of it: Pony, Illustrious, NoobAI, Animagine."""

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dmm.families.family import AuthorsLayout, Component, Family

_AUTHORS = AuthorsLayout("StableDiffusionXLDMMPipeline", "model_merge_xl")

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
        Component("unet", UNet2DConditionModel, "model.diffusion_model.", "diffusion_pytorch_model"),
        Component("vae", AutoencoderKL, "first_stage_model.", "diffusion_pytorch_model"),
        Component("text_encoder", CLIPTextModel, "conditioner.embedders.0.transformer.", "model", "tokenizer"),
        Component(
            "text_encoder_2", CLIPTextModelWithProjection, "conditioner.embedders.1.model.", "model", "tokenizer_2"
        ),
    ),
    controlnet=Component("controlnet", ControlNetModel, "control_model.", "diffusion_pytorch_model"),
    port="time_embedding.linear_2",
    owns=lambda config: config.get("addition_embed_type") in ("text_time", _AUTHORS.embed_type),
    markers=("conditioner.embedders.", "diffusion_model.label_emb.", "diffusion_model.add_embedding2."),
    architecture="stable-diffusion-xl-v1-base",
    kohya_name="sdxl_base_v1-0",
    authors=_AUTHORS,
    hub_id="stabilityai/stable-diffusion-xl-base-1.0",
)
