"""SD 2.x: SD 1.x with OpenCLIP's text encoder, and linear layers around its attention where that one convolves."""

from dataclasses import replace

from transformers import CLIPTextModel

from dmm.families.family import Component
from dmm.families.sd1 import SD1

SD2 = replace(
    SD1,
    name="sd2",
    title="SD 2.x",
    components=(
        *SD1.components[:2],
        Component(
            "text_encoder",
            CLIPTextModel,
            "cond_stage_model.model.",
            "model",
            "tokenizer",
            layout="open_clip",
            # folders have no last layer: the one before it is what the UNet reads
            unread=("text_projection*", "transformer.resblocks.23.*"),
            kohya=SD1.text_encoders[0].kohya,
            comfy=("text_encoders.clip_h.transformer.",),
        ),
    ),
    owns=lambda config: bool(config.get("use_linear_projection")) and not config.get("addition_embed_type"),
    markers=("cond_stage_model.model.",),
    architecture="stable-diffusion-v2-512",
    v_architecture="stable-diffusion-v2-768-v",
    kohya_name="sd_v2",
    authors=None,
    predicts=None,
    hub_id="stabilityai/stable-diffusion-2-1",
)
