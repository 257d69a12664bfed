"""A tiny random pipeline of every family."""

import pytest
import torch
from conftest import MAX_TOKENS, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dmm.families import FAMILIES
from dmm.formats.single_file import save_single_file


def tiny_sd2(seed: int = 0, prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    pipe = tiny_pipeline(seed, prediction_type)
    torch.manual_seed(seed)
    pipe.register_modules(unet=tiny_unet(use_linear_projection=True))
    return pipe


def tiny_sdxl(seed: int = 0, prediction_type: str = "epsilon", **schedule) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
        **schedule,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(force_upcast=True),
        text_encoder=tiny_text_encoder(tokenizer, num_hidden_layers=3),
        text_encoder_2=_with_projection(tokenizer, hidden_size=24, projection_dim=12),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet(
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + 6 * 8,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
        ),
        scheduler=scheduler,
    )


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16 + 24,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 12,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(latent_channels=16, shift_factor=0.0609),
        text_encoder=_with_projection(tokenizer, hidden_size=16, projection_dim=16),
        tokenizer=tokenizer,
        text_encoder_2=_with_projection(tokenizer, hidden_size=24, projection_dim=12),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _with_projection(tokenizer, hidden_size, projection_dim):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection_dim,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


TINY = {"sd1": tiny_pipeline, "sd2": tiny_sd2, "sdxl": tiny_sdxl, "sd3": tiny_sd3}
"""By the families' names, called with a seed."""
UNETS = [name for name in TINY if FAMILIES[name].denoiser.layout]
"""Those whose models are kept in single files, too."""


@pytest.fixture(scope="session", params=[name for name in UNETS if name != "sd1"])
def later_on_disk(request, tmp_path_factory):
    """A family but the first, and a model of it as a folder and as a single file; read only."""
    at = tmp_path_factory.mktemp(request.param)
    pipe = TINY[request.param]()
    pipe.save_pretrained(at / "folder")
    save_single_file(pipe, at / "model.safetensors")
    return FAMILIES[request.param], at / "folder", at / "model.safetensors"
