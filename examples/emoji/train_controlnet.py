"""Train small ControlNets on the embedded base and on pictures that the embedded experts paint.

    python examples/emoji/train_controlnet.py --output controls

leaves ``controls/edges/``, ``controls/colours/`` and ``controls/silhouette/``, diffusers ControlNets that follow the
edges of things, their blurred colours, or their silhouettes, each with an ``example.png`` to try it on. It needs no
drawings. Started again, it goes on where it stopped.

Of the copy of the UNet's encoder that a ControlNet begins as, only low-rank changes are trained, so that three of them
are small enough to be kept beside the base.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import dmm.demo
from denoising import CAPTION_DROPOUT, SCHEDULE
from dmm.data.conditions import MAKERS
from dmm.demo.judge import load_judge
from dmm.models.libraries import quiet_libraries
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.sampling import sample
from drawings import STYLES
from training import fit

CONTROLS = ("edges", "colours", "silhouette")
GUIDANCE_SCALE = 2.0  # the family's
EXAMPLE = "fox"
COPIED = ("conv_in", "time_embedding", "down_blocks", "mid_block")  # what a ControlNet has of the UNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--control", choices=CONTROLS, action="append", help="only this one; may be given again")
    parser.add_argument("--pictures", type=int, default=3, help="of each of the 64 things by each of the 8 hands")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    quiet_libraries()

    base = open_pipeline(ModelSource(dmm.demo.experts()["base"]))
    for model in (base.unet, base.vae, base.text_encoder):
        model.requires_grad_(False)
    concepts = list(load_judge().config.concepts)
    texts = [concept for concept in concepts for _ in range(args.pictures)]
    pictures = paint(texts, args.output / "painted.npy")
    texts = texts * len(STYLES)
    latents = encode(base.vae, pictures)
    states = read(base, [*concepts, ""])
    concept_of = torch.tensor([concepts.index(text) for text in texts])
    for control in args.control or CONTROLS:
        conditions = torch.stack([tensor(MAKERS[control](picture)) for picture in pictures])
        net = new_net(base.unet, args.rank)
        train(net, base.unet, latents, conditions, states, concept_of, args.output / f"{control}-run", args)
        folder = args.output / control
        unload(net).save_pretrained(folder)
        MAKERS[control](pictures[texts.index(EXAMPLE)]).save(folder / "example.png")
        print(f"Wrote {folder}: a ControlNet of {sum(p.numel() for p in net.parameters()):,} parameters.")


def new_net(unet: UNet2DConditionModel, rank: int) -> ControlNetModel:
    """A ControlNet on a copy of the UNet's encoder, of which low-rank changes are trained; all else of it is new."""
    torch.manual_seed(0)
    # as many strides as the VAE has: pixels become latents
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
    layers = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    copied = [name for name in layers if name.split(".")[0] in COPIED]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=copied), net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in COPIED or ".lora_" in name)
    return net


def unload(net: ControlNetModel) -> ControlNetModel:
    """A stock ControlNet with the changes in its weights."""
    for module in list(net.modules()):
        for name, layer in list(module.named_children()):
            if hasattr(layer, "base_layer"):
                layer.merge()
                setattr(module, name, layer.base_layer)
    return net


def train(
    net: ControlNetModel,
    unet: nn.Module,
    latents: Tensor,
    conditions: Tensor,
    states: Tensor,
    concept_of: Tensor,
    work: Path,
    args: argparse.Namespace,
) -> None:
    """Train a ControlNet to the end, in place.

    Args:
        latents: (N, C, h, w), scaled.
        conditions: (N, 3, H, W) in [0, 1].
        states: (K + 1, T, D), what K captions are to the UNet, and the empty one.
        concept_of: (N,), which of the K a picture's caption is.
    """
    scheduler = DDPMScheduler(**SCHEDULE)

    def step(_step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(latents), (args.batch_size,), generator=generator)
        dropped = torch.rand(args.batch_size, generator=generator) < CAPTION_DROPOUT
        text = states[torch.where(dropped, len(states) - 1, concept_of[rows])]
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
        noisy = scheduler.add_noise(latents[rows], noise, timesteps)
        down, middle = net(noisy, timesteps, text, controlnet_cond=conditions[rows], return_dict=False)
        output = unet(
            noisy,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return F.mse_loss(output, noise), {}

    fit(net, step, work, steps=args.steps, learning_rate=args.learning_rate, save_every=50, report_every=50)


@torch.no_grad()
def paint(texts: Sequence[str], kept: Path) -> list[Image.Image]:
    """Pictures by each of the eight hands' experts, one hand after the other, of seeds 0, 1, 2 ..."""
    if not kept.exists():
        pictures: list[Image.Image] = []
        for number, hand in enumerate(STYLES):
            expert = open_pipeline(dmm.demo.expert_sources()[hand])
            seeds = list(range(number * len(texts), (number + 1) * len(texts)))
            pictures += sample(expert, texts, seeds, guidance_scale=GUIDANCE_SCALE, steps=15)
            print(f"painted {len(texts)} pictures by {hand}", flush=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, np.stack([np.asarray(picture) for picture in pictures]))
    return [Image.fromarray(pixels) for pixels in np.load(kept)]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Sequence[Image.Image]) -> Tensor:
    """Scaled latents, (N, C, h, w)."""
    pixels = torch.stack([tensor(picture) for picture in pictures])
    latents = torch.cat([vae.encode(some * 2 - 1).latent_dist.mode() for some in pixels.split(64)])
    return latents * vae.config.scaling_factor


@torch.no_grad()
def read(base: StableDiffusionPipeline, texts: list[str]) -> Tensor:
    """What the text encoder makes of each text: (N, tokens, width)."""
    tokens = base.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return base.text_encoder(tokens.input_ids).last_hidden_state


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


if __name__ == "__main__":
    main()
