"""Train the family's VAE on the drawings: ``python train_vae.py --drawings DIR --work DIR``."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from drawings import SIZE, STYLES, augment, held_out_texts, nudge, read_drawings, shrink
from training import fit

KL_WEIGHT = 3e-6  # on the summed KL against a mean error: posteriors of about 5 % of the latents' spread
LATENT_CHANNELS = 12


def new_vae(latent_channels: int) -> AutoencoderKL:
    """Factor 4, not 8: at 32 pixels, 4 x 4 latents would leave no room for a drawing."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of (B, C, H, W) pictures in [-1, 1]."""
    error = (reconstruction.clamp(-1, 1) - images).square().mean((1, 2, 3))
    return -10 * torch.log10(error / 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--latent-channels", type=int, default=LATENT_CHANNELS)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    args = parser.parse_args()

    drawings = read_drawings(args.drawings)
    held_out = held_out_texts(drawings)
    is_held_out = torch.tensor([text in held_out for text in drawings.texts])
    train, test = drawings.select(~is_held_out), drawings.select(is_held_out)
    torch.manual_seed(0)
    vae = new_vae(args.latent_channels).to(memory_format=torch.channels_last)

    def step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch = train.images[torch.randint(len(train), (args.batch_size,), generator=generator)]
        half = len(batch) // 2  # zoomed pictures are softer than drawn ones: half of them stay crisp
        zoomed = augment(batch[:half], generator, zoom=0.1, turn=0.0, shift=0.05)
        images = torch.cat([zoomed, nudge(batch[half:], generator, reach=4)])
        if torch.rand((), generator=generator) < 0.5:
            images = images.flip(3)
        posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        error = reconstruction - images
        loss = error.square().mean() + 0.2 * error.abs().mean() + KL_WEIGHT * posterior.kl().mean()
        return loss, {"psnr": psnr(reconstruction, images).mean().item()}

    def evaluate() -> dict[str, float]:
        images = shrink(test.images)
        return {"held_out_psnr": psnr(vae.decode(vae.encode(images).latent_dist.mode()).sample, images).mean().item()}

    fit(vae, step, args.work / "vae-run", steps=args.steps, learning_rate=args.learning_rate, evaluate=evaluate)

    with torch.no_grad():
        images = shrink(test.images)
        quality = psnr(vae.decode(vae.encode(images).latent_dist.mode()).sample, images)
        # SD's convention: latents times scaling_factor have unit variance
        latents = vae.encode(shrink(drawings.select(drawings.concepts >= 0).images)).latent_dist.mode()
    print(f"{len(test)} held-out drawings: {quality.mean():.2f} dB")
    for style, name in enumerate(STYLES):
        print(f"  {name}: {quality[test.styles == style].mean():.2f} dB")
    print("spread of the latent channels:", [round(value, 2) for value in latents.std((0, 2, 3)).tolist()])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.save_pretrained(args.work / "vae")


if __name__ == "__main__":
    main()
