"""Train LoRAs of the treated hands, all of them at once: the same base under each, and a batch of its own.

``python train_treated.py --drawings DRAWINGS --work WORK`` leaves ``WORK/treated/STYLE.safetensors``, LoRAs in kohya's
layout for the embedded base, one for each of ``treatments.TREATED_STYLES``. What each sees is what ``train_expert.py``
would show it: views of its hand's published drawings, and captions in the same templates. On a GPU it is minutes; on
a core several hours.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from denoising import CAPTION_DROPOUT, SCHEDULE, TEMPLATES, VIEWS, tokenize
from dmm.demo import experts
from dmm.families import family_of
from dmm.formats.lora import save_kohya_lora
from dmm.models.libraries import quiet_libraries
from drawings import CONCEPTS, STYLES, nudge, read_drawings
from train_expert import LORA_TARGETS
from treatments import ALL_STYLES, TREATED_STYLES, treat

EMA_DECAY = 0.995


class ManyLoras(nn.Module):
    """A frozen linear layer or convolution under K LoRAs: of a batch, each K-th belongs to one of them, in order.

    Args:
        layer: of kernel (h, w), 1 for a linear one.
        count, rank: K, and the rank of each.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, count: int, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(count, rank, layer.weight[0].numel(), device=layer.weight.device))
        self.up = nn.Parameter(torch.zeros(count, len(layer.weight), rank, device=layer.weight.device))
        nn.init.uniform_(self.down, -(self.down.shape[2] ** -0.5), self.down.shape[2] ** -0.5)  # as PEFT begins

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., in) or (B, C, H, W), B a multiple of K, to what the layer gives, and more."""
        count, own = len(self.down), self.layer(x)
        if isinstance(self.layer, nn.Linear):
            more = x.reshape(count, -1, x.shape[-1]) @ self.down.mT @ self.up.mT
            return own + more.reshape(own.shape)
        assert not isinstance(self.layer.padding, str)
        columns = F.unfold(x, self.layer.kernel_size, padding=self.layer.padding, stride=self.layer.stride)
        columns = columns.unflatten(0, (count, -1))
        more = self.up[:, None] @ (self.down[:, None] @ columns)
        return own + more.reshape(own.shape)


def put_under(unet: nn.Module, count: int, rank: int) -> dict[str, ManyLoras]:
    """Wrap every layer that :data:`train_expert.LORA_TARGETS` names, in place; by the layers' names."""
    wrapped = {}
    for name, layer in list(unet.named_modules()):
        if any(f".{name}".endswith(f".{one}") for one in LORA_TARGETS):
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            wrapped[name] = ManyLoras(layer, count, rank)
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, wrapped[name])
    return wrapped


def save_loras(folder: Path, styles: Sequence[str], loras: dict[str, ManyLoras], rank: int) -> None:
    """Write each LoRA to ``folder/STYLE.safetensors``, in half precision."""
    pipeline = StableDiffusionPipeline.from_pretrained(experts()["base"], dtype=torch.float32)
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))
    folder.mkdir(parents=True, exist_ok=True)
    for k, style in enumerate(styles):
        with torch.no_grad():
            for name, lora in loras.items():
                layer = pipeline.unet.get_submodule(name)
                for to, of in ((layer.lora_A, lora.down), (layer.lora_B, lora.up)):
                    weight = to["default"].weight
                    weight.copy_(of[k].reshape(weight.shape))
        file = folder / f"{style}.safetensors"
        save_kohya_lora(file.with_suffix(".new"), {"unet": pipeline.unet}, family_of(pipeline), dtype=torch.float16)
        file.with_suffix(".new").replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--styles", nargs="*", default=TREATED_STYLES)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=48, help="of each LoRA")
    parser.add_argument("--views", type=int, default=VIEWS, help="of each drawing, moved a little")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the schedule after so long, if not before")
    args = parser.parse_args()
    quiet_libraries()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    drawings = read_drawings(args.drawings)
    published = drawings.select(drawings.concepts >= 0)
    pipeline = StableDiffusionPipeline.from_pretrained(experts()["base"], dtype=torch.float32).to(device)
    wanted = torch.tensor([ALL_STYLES.index(style) for style in args.styles])
    rows = [(published.styles == style % len(STYLES)).nonzero().flatten() for style in wanted]
    moves = torch.Generator().manual_seed(0)
    latents = []  # of each style: (drawings, views, C, h, w)
    with torch.no_grad():
        for style, own in zip(wanted, rows, strict=True):
            moved = torch.cat([nudge(published.images[own], moves, 2) for _ in range(args.views)])
            treated = treat(moved, style.expand(len(moved))).to(device)
            encoded = torch.cat([pipeline.vae.encode(some).latent_dist.mode() for some in treated.split(256)])
            latents.append(encoded.unflatten(0, (args.views, -1)).transpose(0, 1) * pipeline.vae.config.scaling_factor)
        texts = ["", *(template.format(one) for one in CONCEPTS for template in TEMPLATES)]
        tokens = [tokenize(pipeline.tokenizer, texts[i : i + 64]).to(device) for i in range(0, len(texts), 64)]
        states = torch.cat([pipeline.text_encoder(some).last_hidden_state for some in tokens])

    pipeline.unet.requires_grad_(False)
    torch.manual_seed(0)
    loras = put_under(pipeline.unet, len(args.styles), args.lora_rank)
    parameters = [one for one in pipeline.unet.parameters() if one.requires_grad]
    average = [one.detach().clone() for one in parameters]
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type="epsilon")
    alphas = scheduler.alphas_cumprod.to(device)
    size = args.batch_size
    args.work.mkdir(parents=True, exist_ok=True)
    started, losses = time.monotonic(), []
    step, share = 0, 0.0
    while share < 1:
        rate = args.learning_rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(step)
        clean, read = [], []
        for own, encoded in zip(rows, latents, strict=True):
            drawn = torch.randint(len(own), (size,), generator=generator)
            view = torch.randint(args.views, (size,), generator=generator)
            clean.append(encoded[drawn.to(device), view.to(device)])
            template = torch.randint(len(TEMPLATES), (size,), generator=generator)
            dropped = torch.rand(size, generator=generator) < CAPTION_DROPOUT
            named = 1 + published.concepts[own[drawn]] * len(TEMPLATES) + template
            read.append(torch.where(dropped, 0, named))
        x0 = torch.cat(clean)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), generator=generator).to(device)
        signal = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
        output = pipeline.unet(noisy, timesteps, states[torch.cat(read).to(device)]).sample
        # the sum of means: each LoRA's gradient is what it would be by itself
        loss = F.mse_loss(output, noise, reduction="none").unflatten(0, (len(rows), -1)).flatten(1).mean(1)
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [one.detach() for one in parameters], 1 - min(EMA_DECAY, 1 - (1 + step) ** -0.75))
        losses.append(loss.detach().mean())
        seconds = time.monotonic() - started
        share = max(step / args.steps, seconds / args.seconds)
        if step % 50 == 0 or share >= 1:
            told = {"step": step, "seconds": round(seconds, 1), "loss": torch.stack(losses).mean().item()}
            losses = []
            print(json.dumps(told), flush=True)
            with (args.work / "treated.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
    with torch.no_grad():
        for one, mean in zip(parameters, average, strict=True):
            one.copy_(mean)
    save_loras(args.work / "treated", args.styles, loras, args.lora_rank)


if __name__ == "__main__":
    main()
