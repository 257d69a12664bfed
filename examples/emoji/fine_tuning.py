"""Fine-tuning a Stable Diffusion pipeline on drawings: what all experts and shards here go through."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from denoising import SCHEDULE, Denoiser, denoising_loss
from training import fit


def fine_tune(
    pipeline: StableDiffusionPipeline,
    latents: Tensor,
    texts: list[str],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    prediction_type: str = "epsilon",
    seed: int = 0,
) -> None:
    """Train what requires a gradient in a pipeline's UNet and text encoder, in place.

    Args:
        latents: (N, views, C, h, w), scaled, of N drawings; each sample is a view drawn at random.
        texts: N names of concepts.
        folder: of the run, which goes on where it stopped.
        prediction_type: what the UNet learns to predict.
    """
    model = Denoiser(pipeline.unet, pipeline.text_encoder)
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction_type)

    def step(_step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(texts), (batch_size,), generator=generator)
        views = torch.randint(latents.shape[1], (batch_size,), generator=generator)
        some = [texts[i] for i in rows.tolist()]
        return denoising_loss(model, pipeline.tokenizer, scheduler, latents[rows, views], some, generator), {}

    fit(model, step, folder, steps=steps, learning_rate=learning_rate, seed=seed)
