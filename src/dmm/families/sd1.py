"""SD 1.x."""

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from dmm.families.conditioning import read_no_size, read_one_clip
from dmm.families.family import AuthorsLayout, Component, Family

_AUTHORS = AuthorsLayout("StableDiffusionDMMPipeline", "model_merge", None, "add_embedding")

SD1 = Family(
    name="sd1",
    title="SD 1.x",
    pipeline_class=StableDiffusionPipeline,
    pipelines={
        frozenset(): StableDiffusionPipeline,
        frozenset({"image"}): StableDiffusionImg2ImgPipeline,
        frozenset({"image", "mask"}): StableDiffusionInpaintPipeline,
        frozenset({"control"}): StableDiffusionControlNetPipeline,
        frozenset({"control", "image"}): StableDiffusionControlNetImg2ImgPipeline,
        frozenset({"control", "image", "mask"}): StableDiffusionControlNetInpaintPipeline,
    },
    components=(
        Component(
            "unet",
            UNet2DConditionModel,
            "model.diffusion_model.",
            "diffusion_pytorch_model",
            layout="unet",
            kohya=("lora_unet_",),
        ),
        Component("vae", AutoencoderKL, "first_stage_model.", "diffusion_pytorch_model", layout="vae"),
        Component(
            "text_encoder",
            CLIPTextModel,
            "cond_stage_model.transformer.",
            "model",
            "tokenizer",
            layout="clip",
            unread=("*text_projection*",),
            # diffusers' writer of kohya's layout numbers the only one too
            kohya=("lora_te_", "lora_te1_"),
            comfy=("text_encoders.clip_l.transformer.",),
        ),
    ),
    controlnet=Component("controlnet", ControlNetModel, "control_model.", "diffusion_pytorch_model"),
    read_tokens=read_one_clip,
    layers_left_out=0,
    read_size=read_no_size,
    prompt_arguments={"encoder_hidden_states": "prompt_embeds"},
    port="time_embedding.linear_2",
    owns=lambda config: (
        not config.get("use_linear_projection") and config.get("addition_embed_type") in (None, _AUTHORS.embed_type)
    ),
    markers=("model.diffusion_model.input_blocks.", "cond_stage_model.transformer."),
    architecture="stable-diffusion-v1",
    v_architecture="stable-diffusion-v1",
    kohya_name="sd_v1",
    authors=_AUTHORS,
    predicts="epsilon",
    hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
)
