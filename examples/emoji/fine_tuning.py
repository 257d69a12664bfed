"""Fine-tuning a pipeline on drawings: what all experts and shards here go through."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from denoising import SCHEDULE, Denoiser, denoising_loss
from training import fit
from xl import DenoiserXL


def fine_tune(
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline,
    latents: Tensor,
    texts: list[str],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    prediction_type: str = "epsilon",
    zero_terminal_snr: bool = False,
    seed: int = 0,
) -> None:
    """Train what requires a gradient in a pipeline's UNet and text encoder, in place.

    Args:
        latents: (N, views, C, h, w), scaled, of N drawings; each sample is a view drawn at random.
        texts: N names of concepts.
        folder: of the run, which goes on where it stopped.
        prediction_type: what the UNet learns to predict.
        zero_terminal_snr: rescale the schedule so that its last step is pure noise (arXiv:2305.08891).
    """
    is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
    text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2] if is_xl else [pipeline.text_encoder]
    model = (DenoiserXL if is_xl else Denoiser)(pipeline.unet, *text_encoders)
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction_type, rescale_betas_zero_snr=zero_terminal_snr)

    def step(_step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(texts), (batch_size,), generator=generator)
        views = torch.randint(latents.shape[1], (batch_size,), generator=generator)
        some = [texts[i] for i in rows.tolist()]
        return denoising_loss(model, pipeline.tokenizer, scheduler, latents[rows, views], some, generator), {}

    fit(model, step, folder, steps=steps, learning_rate=learning_rate, seed=seed)
