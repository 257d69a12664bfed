"""A small Stable Diffusion 3: a transformer of joint blocks, trained by rectified flow, that reads two CLIPs and no T5.

VAE and text encoders are those of the embedded SDXL: what they make of drawings and captions is learned already.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from drawings import SIZE

WIDTH = 128
TOKENS_WITHOUT_T5 = 256  # zeros that SD 3's pipeline puts where T5 is left out
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear"),
)


def new_transformer(latent_channels: int, text_width: int, pooled_width: int, patch_size: int) -> SD3Transformer2DModel:
    """Six joint blocks with normalised queries and keys, as SD 3.5 has them."""
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=patch_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=text_width,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=SIZE // 4 // patch_size,
        qk_norm="rms_norm",
    )


def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """A text encoder whose pooled embedding is projected by the identity: SD 3 reads that of both."""
    config = CLIPTextConfig(**{**encoder.config.to_dict(), "projection_dim": encoder.config.hidden_size})
    projecting = CLIPTextModelWithProjection(config)
    inner = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    projecting.text_model.load_state_dict(inner)
    with torch.no_grad():
        projecting.text_projection.weight.copy_(torch.eye(config.hidden_size))
    return projecting.eval()


def new_pipeline(transformer: SD3Transformer2DModel, source: Any) -> StableDiffusion3Pipeline:
    """The stock pipeline of a transformer, with the VAE, tokenizer and text encoders of an embedded SDXL."""
    source.vae.register_to_config(shift_factor=0.0, force_upcast=False)  # SD 3's pipeline adds it whatever it is
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=source.vae,
        text_encoder=with_projection(source.text_encoder),
        tokenizer=source.tokenizer,
        text_encoder_2=source.text_encoder_2,
        tokenizer_2=source.tokenizer_2,
        text_encoder_3=None,
        tokenizer_3=None,
    )


class Repeated:
    """Joint attention in which the last token of the text counts as many.

    The text has no positions: tokens that are equal at first are equal after every block. One that weighs
    log(TOKENS_WITHOUT_T5) more is then as good as all, and costs a fourth.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Both streams' tokens, attended to by both: (B, N, D) and (B, T, D), the last of T standing for many."""
        batch, num = hidden_states.shape[:2]

        def heads(image: Tensor, text: Tensor, norm: Any, text_norm: Any) -> Tensor:
            split = [
                one.view(batch, -1, attn.heads, one.shape[-1] // attn.heads).transpose(1, 2) for one in (image, text)
            ]
            normed = [one if by is None else by(one) for one, by in zip(split, (norm, text_norm), strict=True)]
            return torch.cat(normed, 2)

        text = encoder_hidden_states
        query = heads(attn.to_q(hidden_states), attn.add_q_proj(text), attn.norm_q, attn.norm_added_q)
        key = heads(attn.to_k(hidden_states), attn.add_k_proj(text), attn.norm_k, attn.norm_added_k)
        value = heads(attn.to_v(hidden_states), attn.add_v_proj(text), None, None)
        more = torch.zeros(key.shape[2], device=key.device, dtype=query.dtype)
        more[-1] = math.log(TOKENS_WITHOUT_T5)
        mixed = F.scaled_dot_product_attention(
            query, key.to(query.dtype), value.to(query.dtype), more[None, None, None]
        )
        mixed = mixed.transpose(1, 2).reshape(batch, -1, attn.heads * mixed.shape[-1])
        image, text = mixed[:, :num], mixed[:, num:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


@torch.no_grad()
def read(pipeline: StableDiffusion3Pipeline, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What the transformer reads of B captions: (B, T + 1, D), the last for all that T5 would say, and (B, P)."""
    states, _, pooled, _ = pipeline.encode_prompt(list(texts), None, None, do_classifier_free_guidance=False)
    return states[:, : 1 - TOKENS_WITHOUT_T5], pooled


def flow_loss(
    transformer: SD3Transformer2DModel,
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    states: Tensor,
    pooled: Tensor,
) -> Tensor:
    """Mean squared error of the predicted velocity, noise less latents.

    Args:
        latents, noise: (B, C, h, w), the former scaled.
        sigmas: (B,) in (0, 1).
        states, pooled: of :func:`read`.
    """
    spread = sigmas[:, None, None, None]
    velocity = transformer(
        (1 - spread) * latents + spread * noise,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=1000 * sigmas,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity.float(), noise - latents)
