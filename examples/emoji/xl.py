"""A small SDXL: two text encoders, a pooled embedding, the size of the picture as a condition."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from denoising import SCHEDULE, Denoiser, tokenize
from drawings import SIZE

TEXT_WIDTH = 64  # of each text encoder, and of the pooled embedding
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original size, corner of the crop, target size
TIME_ID_WIDTH = 16


class DenoiserXL(Denoiser):
    """The trainable parts of a small SDXL."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModelWithProjection
    ) -> None:
        super().__init__(unet, text_encoder)
        self.text_encoder_2 = text_encoder_2

    def read(self, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> dict[str, Any]:
        """What the UNet is given of B captions; an empty one is all zeros, as SDXL's pipeline has it."""
        ids = tokenize(tokenizer, texts)
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        kept = torch.tensor([bool(text) for text in texts])[:, None]
        # the last layers but one, which no final norm follows
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        added = {"text_embeds": second.text_embeds * kept, "time_ids": time_ids(len(texts))}
        return {"encoder_hidden_states": states * kept[..., None], "added_cond_kwargs": added}


def time_ids(count: int) -> Tensor:
    """(count, 6): whole pictures of the size that everything here has."""
    return torch.tensor([TIME_IDS], dtype=torch.float32).expand(count, -1)


def new_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The first, as CLIP-L is one, and the second, as OpenCLIP-G is one: of another activation, with a projection."""
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": TEXT_WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config, hidden_act="gelu"))
    return CLIPTextModel(CLIPTextConfig(**config, hidden_act="quick_gelu")), second


def new_unet(latent_channels: int) -> UNet2DConditionModel:
    """Two levels, 8 x 8 and 4 x 4, the lower one with two transformer blocks in each place."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(56, 64),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=(4, 4),  # the numbers of heads: diffusers keeps SDXL's name for it
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=len(TIME_IDS) * TIME_ID_WIDTH + TEXT_WIDTH,
    )


def new_pipeline(model: DenoiserXL, vae: Any, tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """The stock pipeline of what was trained."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
