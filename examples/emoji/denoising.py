"""What the base and its experts share: captions, cached latents and the denoising loss."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from drawings import nudge

SCHEDULE = {  # SD 1.5's
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
TEMPLATES = ("{}", "{}", "a {}", "a drawing of a {}", "{} emoji")  # not a word of style
CAPTION_DROPOUT = 0.1
VIEWS = 16  # slightly moved views of each drawing, encoded once


class Denoiser(nn.Module):
    """The trainable parts, as one module: what is saved, averaged and resumed together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet.to(memory_format=torch.channels_last)
        self.text_encoder = text_encoder

    def read(self, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> dict[str, Any]:
        """What the UNet is given of B captions, as its keyword arguments."""
        return {"encoder_hidden_states": self.text_encoder(tokenize(tokenizer, texts)).last_hidden_state}


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """(B, T) token ids, padded to the T that a text encoder reads."""
    ids: Tensor = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def captions(texts: Sequence[str], generator: torch.Generator) -> list[str]:
    """Each text in a template drawn at random, or empty with probability :data:`CAPTION_DROPOUT`."""
    templates = torch.randint(len(TEMPLATES), (len(texts),), generator=generator).tolist()
    dropped = (torch.rand(len(texts), generator=generator) < CAPTION_DROPOUT).tolist()
    return ["" if d else TEMPLATES[i].format(t) for t, i, d in zip(texts, templates, dropped, strict=True)]


@torch.no_grad()
def encode_views(vae: AutoencoderKL, images: Tensor, views: int = VIEWS, reach: int = 2) -> Tensor:
    """Scaled latents of views of every drawing, moved by up to ``reach`` pixels of 64: (N, views, C, h, w).

    Args:
        images: (N, 3, 64, 64) uint8.
    """
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for _ in range(views):
        moved = nudge(images, generator, reach)
        encoded.append(torch.cat([vae.encode(some).latent_dist.mode() for some in moved.split(128)]))
    return torch.stack(encoded, 1) * vae.config.scaling_factor


def denoising_loss(
    model: Denoiser,
    tokenizer: CLIPTokenizer,
    scheduler: DDPMScheduler,
    latents: Tensor,
    texts: Sequence[str],
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the predicted noise, or velocity, as the scheduler's ``prediction_type`` says.

    Args:
        latents: (B, C, h, w), scaled.
        texts: B names of concepts.
    """
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    conditions = model.read(tokenizer, captions(texts, generator))
    output = model.unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, **conditions).sample
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    return F.mse_loss(output, target)
