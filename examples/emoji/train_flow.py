"""Train the small SD 3: its base on all eight hands at once, then LoRAs of single hands.

``python train_flow.py --drawings DRAWINGS --work WORK`` leaves ``WORK/sd3-base/``, a stock pipeline folder, and
``WORK/sd3-experts/HAND.safetensors`` in diffusers' layout, each as good as ``--seconds`` and ``--lora-seconds`` allow:
the learning rate follows the clock. Started again, it goes on where it was; what is finished is only measured.

On a GPU some minutes are enough; one core of a CPU needs an hour for less.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import flow
from denoising import CAPTION_DROPOUT, TEMPLATES, encode_views
from dmm.demo import experts
from dmm.demo.judge import judge_images, load_judge
from dmm.models.libraries import quiet_libraries
from dmm.models.teachers import ModelSource, open_pipeline
from drawings import STYLES, read_drawings
from training import log

HANDS = ("noto", "openmoji", "fluent-contrast")
EMA_DECAY = 0.999
SAVE_EVERY = 20.0  # seconds


def train(
    model: nn.Module,
    loss_of_step: Callable[[torch.Generator], Tensor],
    run: Path,
    *,
    seconds: float,
    learning_rate: float,
    device: torch.device,
) -> None:
    """Train what requires a gradient in ``model`` for so long, and leave it with its averaged weights.

    Args:
        loss_of_step: a generator, which is a function of the step alone, to the loss.
        run: folder of the checkpoint and the log.
        seconds: of training, those before an interruption included.
    """
    run.mkdir(parents=True, exist_ok=True)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(
        parameters, learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    average = [one.detach().clone() for one in parameters]
    checkpoint, step, before = run / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        average, step, before = state["average"], state["step"], state["seconds"]
    model.train()
    started = saved = time.monotonic()
    losses: list[Tensor] = []
    while (spent := before + time.monotonic() - started) < seconds:
        rate = learning_rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * spent / seconds))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of_step(torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(EMA_DECAY, 1 - (1 + step) ** -0.75)
        torch._foreach_lerp_(average, [one.detach() for one in parameters], 1 - decay)
        losses.append(loss.detach())
        if time.monotonic() - saved > SAVE_EVERY:
            state = {
                "model": {name: one.detach() for name, one in trained.items()},
                "optimizer": optimizer.state_dict(),
            }
            state |= {"average": average, "step": step, "seconds": before + time.monotonic() - started}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            save_file(
                {name: one.half() for name, one in zip(trained, average, strict=True)}, run / "average.safetensors"
            )
            log(run, {"step": step, "seconds": spent, "loss": torch.stack(losses).mean().item()})
            losses, saved = [], time.monotonic()
    save_file({name: one.half() for name, one in zip(trained, average, strict=True)}, run / "average.safetensors")
    with torch.no_grad():
        for one, mean in zip(parameters, average, strict=True):
            one.copy_(mean)
    torch.save(
        {
            "model": {name: one.detach() for name, one in trained.items()},
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
            "seconds": seconds,
        },
        checkpoint,
    )
    log(run, {"step": step, "seconds": seconds})
    model.eval()


def measure(pipeline: StableDiffusion3Pipeline, name: str, count: int, run: Path) -> dict[str, float]:
    """What the judge says of ``count`` pictures of every concept: shares of the hands, and of right things."""
    judge = load_judge()
    concepts, styles = list(judge.config.concepts), list(judge.config.styles)
    pictures: list[Image.Image] = []
    truth: list[int] = []
    pipeline.set_progress_bar_config(disable=True)
    for seed in range(count):
        generators = [torch.Generator().manual_seed(1000 * seed + place) for place in range(len(concepts))]
        made = pipeline(
            concepts, num_inference_steps=25, guidance_scale=2.0, generator=generators, output_type="np"
        ).images
        pictures += [Image.fromarray((one * 255).round().astype(np.uint8)) for one in made]
        truth += range(len(concepts))
    verdict = judge_images(judge, pictures)
    shares = torch.bincount(verdict.style_logits.argmax(1), minlength=len(styles)) / len(pictures)
    right = (verdict.concept_logits.argmax(1) == torch.tensor(truth)).float().mean().item()
    row = {**dict(zip(styles, shares.tolist(), strict=True)), "right thing": right}
    log(run, row)
    sheet = Image.new("RGB", (16 * 32, 4 * 32))
    for place, picture in enumerate(pictures[: len(concepts)]):
        sheet.paste(picture, (place % 16 * 32, place // 16 * 32))
    sheet.save(run / f"{name}.png")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--source", type=Path, help="an SDXL whose VAE and text encoders are taken (default: the embedded base)"
    )
    parser.add_argument("--base", type=Path, help="a base that was trained before: only LoRAs of it are")
    parser.add_argument("--seconds", type=float, default=200.0, help="of the base")
    parser.add_argument("--lora-seconds", type=float, default=30.0, help="of each LoRA")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lora-batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--lora-learning-rate", type=float, default=2e-3)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--patch-size", type=int, default=1)
    parser.add_argument("--count", type=int, default=4, help="pictures of each of the 64 concepts that are judged")
    parser.add_argument("--hands", nargs="*", default=HANDS)
    args = parser.parse_args()
    quiet_libraries()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    drawings = read_drawings(args.drawings)
    published = drawings.select(drawings.concepts >= 0)
    concepts = sorted(set(published.texts))
    texts = ["", *(template.format(one) for one in concepts for template in TEMPLATES)]
    torch.manual_seed(0)
    if args.base:
        pipeline = open_pipeline(ModelSource(args.base)).to(device)
    else:
        source = StableDiffusionXLPipeline.from_pretrained(
            args.source or experts("sdxl")["base"], unet=None, torch_dtype=torch.float32
        )
        width = source.text_encoder.config.hidden_size + source.text_encoder_2.config.hidden_size
        transformer = flow.new_transformer(source.vae.config.latent_channels, width, width, args.patch_size)
        pipeline = flow.new_pipeline(transformer, source).to(device)
    transformer = pipeline.transformer
    latents = encode_views(pipeline.vae, published.images.to(device))
    states, pooled = flow.read(pipeline, texts)
    text_of = torch.tensor([concepts.index(one) for one in published.texts])
    stock = dict(transformer.attn_processors)

    def loss_on(rows: Tensor, size: int) -> Callable[[torch.Generator], Tensor]:
        def loss_of_step(generator: torch.Generator) -> Tensor:
            drawn = rows[torch.randint(len(rows), (size,), generator=generator)]
            views = torch.randint(latents.shape[1], (size,), generator=generator)
            templates = torch.randint(len(TEMPLATES), (size,), generator=generator)
            dropped = torch.rand(size, generator=generator) < CAPTION_DROPOUT
            read = torch.where(dropped, 0, 1 + text_of[drawn] * len(TEMPLATES) + templates).to(device)
            sigmas = torch.randn(size, generator=generator).sigmoid().to(device)
            clean = latents[drawn.to(device), views.to(device)]
            on_device = torch.Generator(device).manual_seed(generator.initial_seed())
            noise = torch.randn(clean.shape, generator=on_device, device=device)
            return flow.flow_loss(transformer, clean, noise, sigmas, states[read], pooled[read])

        return loss_of_step

    def fit(run: Path, rows: Tensor, size: int, seconds: float, rate: float) -> None:
        transformer.set_attn_processor(flow.Repeated())
        train(transformer, loss_on(rows, size), run, seconds=seconds, learning_rate=rate, device=device)
        transformer.set_attn_processor(dict(stock))

    figures: dict[str, Any] = {}

    def judge(name: str, run: Path) -> None:
        if not args.count:
            return
        figures[name] = measure(pipeline, name, args.count, run)
        (args.work / "sd3-judged.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    if not args.base:
        run = args.work / "sd3-base-run"
        fit(run, torch.arange(len(published)), args.batch_size, args.seconds, args.learning_rate)
        pipeline.save_pretrained(args.work / "sd3-base")
        judge("base", run)
    transformer.requires_grad_(False)
    made = args.work / "sd3-experts"
    made.mkdir(parents=True, exist_ok=True)
    targets = list(flow.LORA_TARGETS)
    for hand in args.hands:
        run = args.work / f"sd3-{hand}-run"
        torch.manual_seed(0)
        transformer.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=targets), hand)
        rows = (published.styles == STYLES.index(hand)).nonzero().flatten()
        fit(run, rows, args.lora_batch_size, args.lora_seconds, args.lora_learning_rate)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(transformer, adapter_name=hand))
        pipeline.save_lora_weights(made, transformer_lora_layers=layers, weight_name=f"{hand}.safetensors")
        judge(hand, run)
        transformer.delete_adapters(hand)


if __name__ == "__main__":
    main()
