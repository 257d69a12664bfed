"""Train a small ControlNet that follows edges, on the embedded base and pictures that it paints itself.

    python examples/emoji/train_controlnet.py --output edges

leaves ``edges/``, a diffusers ControlNet, and ``edges/example.png``, the edges of a picture to try it on. It needs no
drawings. Started again, it goes on where it stopped.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

import dmm.demo
from denoising import CAPTION_DROPOUT, SCHEDULE
from dmm.demo.judge import load_judge
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.sampling import sample
from training import fit

GUIDANCE_SCALE = 2.0  # the family's
THRESHOLD = 48  # of 255, of an edge
EXAMPLE = "fox"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=8, help="of each of the 64 things")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()

    base = open_pipeline(ModelSource(dmm.demo.experts()["base"]))
    for model in (base.unet, base.vae, base.text_encoder):
        model.requires_grad_(False)
    concepts = list(load_judge().config.concepts)
    texts = [concept for concept in concepts for _ in range(args.pictures)]
    work = args.output.with_name(f"{args.output.name}-run")
    latents, outlines, pictures = paint(base, texts, work)
    states = read(base, [*concepts, ""])

    torch.manual_seed(0)
    # as many strides as the VAE has: pixels become latents
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32, 64))
    scheduler = DDPMScheduler(**SCHEDULE)

    def step(_step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(texts), (args.batch_size,), generator=generator)
        dropped = torch.rand(args.batch_size, generator=generator) < CAPTION_DROPOUT
        text = states[torch.where(dropped, len(concepts), rows // args.pictures)]
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)
        down, middle = net(noisy, timesteps, text, controlnet_cond=outlines[rows], return_dict=False)
        output = base.unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return F.mse_loss(output, noise), {}

    fit(net, step, work, steps=args.steps, learning_rate=args.learning_rate, save_every=50, report_every=50)
    net.save_pretrained(args.output)
    edges(pictures[texts.index(EXAMPLE)]).save(args.output / "example.png")
    print(f"Wrote {args.output}: a ControlNet of {sum(p.numel() for p in net.parameters()):,} parameters.")


@torch.no_grad()
def paint(base: StableDiffusionPipeline, texts: list[str], work: Path) -> tuple[Tensor, Tensor, list[Image.Image]]:
    """Pictures by the base, of seeds 0, 1, 2 ...; their scaled latents and their edges, (N, 3, H, W) in [0, 1]."""
    kept = work / "pictures.npy"
    if kept.exists():
        pictures = [Image.fromarray(pixels) for pixels in np.load(kept)]
    else:
        seeds = list(range(len(texts)))
        pictures = list(sample(base, texts, seeds, guidance_scale=GUIDANCE_SCALE, steps=15))
        work.mkdir(parents=True, exist_ok=True)
        np.save(kept, np.stack([np.asarray(picture) for picture in pictures]))
    pixels = torch.stack([tensor(picture) for picture in pictures])
    vae = base.vae
    latents = torch.cat([vae.encode(some * 2 - 1).latent_dist.mode() for some in pixels.split(64)])
    outlines = torch.stack([tensor(edges(picture)) for picture in pictures])
    return latents * vae.config.scaling_factor, outlines, pictures


@torch.no_grad()
def read(base: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    """What the text encoder makes of each text: (N, tokens, width)."""
    tokens = base.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return base.text_encoder(tokens.input_ids).last_hidden_state


def edges(picture: Image.Image) -> Image.Image:
    """White lines on black where neighbouring pixels differ."""
    # on a margin of its own colour: the filter leaves the outermost pixels as they are
    grey = np.pad(np.asarray(picture.convert("L")), 1, mode="edge")
    found = Image.fromarray(grey).filter(ImageFilter.FIND_EDGES).crop((1, 1, grey.shape[1] - 1, grey.shape[0] - 1))
    return found.point([255 * (level > THRESHOLD) for level in range(256)]).convert("RGB")


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


if __name__ == "__main__":
    main()
