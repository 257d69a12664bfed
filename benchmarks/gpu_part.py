"""One training of full size on random weights: a part of benchmarks/gpu.py. Its last line is a JSON object.

Of rank 0 the student learns of eight teachers, of another rank one style's adapter of its one teacher: as merges do.
"""

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from full_size import Unsaved, default_dtype, peak_bytes, some_adapter
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dmm.families import FAMILIES
from dmm.maths.processes import VariancePreserving
from dmm.maths.sharing import share_batch
from dmm.models.student import AdaptedStudent, StyledStudent
from dmm.models.styles import StylePrompts
from dmm.models.teachers import freeze
from dmm.planning.step import Shapes, trace_step
from dmm.recipes.recipe import Recipe
from dmm.training.batches import Batches, Role
from dmm.training.distill import Imitation, Teacher
from dmm.training.residency import place_teachers
from dmm.training.trainer import LOG

NUM_TEACHERS = 8
SIZES = {"sd15": 512, "sdxl": 1024}


def unet_config(shapes: str, width: int) -> dict[str, Any]:
    """Of the family's UNet, at a width; the families' own is 320."""
    if shapes == "sd15":
        widths = (width, 2 * width, 4 * width, 4 * width)
        return {"block_out_channels": widths, "attention_head_dim": 8, "cross_attention_dim": 768}
    widths = (width, 2 * width, 4 * width)
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [max(1, channels // 64) for channels in widths],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def build(shapes: str, width: int, dtype: torch.dtype, device: torch.device, seed: int) -> UNet2DConditionModel:
    """A UNet, made where it stays and as what it stays."""
    torch.manual_seed(seed)
    with default_dtype(dtype), device:
        unet = UNet2DConditionModel(sample_size=64, **unet_config(shapes, width))
    return unet.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class RandomShapes(Shapes):
    """What a UNet is given without a VAE and text encoders."""

    def latents(self, num_samples: int) -> Tensor:
        """(B, 4, H, W)."""
        return torch.empty(num_samples, 4, self.size // 8, self.size // 8, device="meta")

    def conditioning(self, num_samples: int) -> dict[str, Tensor]:
        """Embeddings of texts, and what else the family's UNet reads."""
        width = self.denoiser.config.cross_attention_dim
        told = {"encoder_hidden_states": torch.empty(num_samples, 77, width, device="meta")}
        if self.denoiser.config.addition_embed_type:
            told["added_cond_kwargs.text_embeds"] = torch.empty(num_samples, 1280, device="meta")
            told["added_cond_kwargs.time_ids"] = torch.empty(num_samples, 6, device="meta")
        return told


class RandomData:
    """Latents and texts of a family's shapes."""

    num_rows = 64

    def __init__(self, shapes: RandomShapes) -> None:
        generator = torch.Generator().manual_seed(0)
        self._latents = torch.randn(shapes.latents(self.num_rows).shape, generator=generator)
        self.latent_shape = tuple(self._latents.shape[1:])
        told = shapes.conditioning(self.num_rows)
        self._told = {name: torch.randn(one.shape, generator=generator) for name, one in told.items()}

    def rows_of(self, _painter: str) -> Tensor:
        """None: they are everyone's."""
        return torch.arange(0)

    def latents(self, rows: Tensor) -> Tensor:
        """(B, 4, H, W)."""
        return self._latents[rows]

    def shown(self, _rows: Tensor, _styles: Sequence[str]) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    @property
    def sizes(self) -> list[Tensor]:
        """All rows are of one."""
        return [torch.arange(self.num_rows)]

    def conditioning(self, _encoder: str, rows: Tensor, _dropped: Tensor) -> dict[str, Tensor]:
        """Of B rows."""
        return {name: one[rows] for name, one in self._told.items()}


def longest_kernels(profiler: profile) -> dict[str, float]:
    """The kernels that take the longest, and their shares of the GPU's time, in per cent."""
    kernels = [(one.key, one.self_device_time_total) for one in profiler.key_averages()]
    total = sum(time for _, time in kernels) or 1
    longest = sorted(kernels, key=itemgetter(1), reverse=True)[:25]
    return {name[:120]: round(100 * time / total, 2) for name, time in longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SIZES, default="sd15")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=160, help="of a step")
    parser.add_argument("--micro-batch-size", type=int, default=20, help="at once; of one teacher")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--size", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="convolutions try out their kernels")
    parser.add_argument("--profile", action="store_true", help="tell, too, where the GPU's time goes")
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    device, size = accelerator.device, args.size or SIZES[args.shapes]
    names = [f"teacher {index}" for index in range(1 if args.rank else NUM_TEACHERS)]
    batch_size = max(args.batch_size, len(names))
    training = {
        **{"steps": args.steps, "batch_size": batch_size, "micro_batch_size": args.micro_batch_size},
        **{"gradient_checkpointing": args.gradient_checkpointing, "compile": args.compile},
    }
    recipe = Recipe.model_validate(
        {
            "base": "random/base",
            "teachers": [{"name": name, "model": "random/teacher"} for name in names],
            "data": {"dataset": "random/data"},
            "size": size,
            "styles": {"rank": args.rank},
            "training": training,
            "losses": {"adversarial": 0},
            "logging": {"every": 1, "sample_every": None},
        }
    )
    family = FAMILIES["sdxl" if args.shapes == "sdxl" else "sd1"]
    meta = build(args.shapes, args.width, torch.float32, torch.device("meta"), 0)
    shapes = RandomShapes(family, {"unet": meta}, size)
    on_gpu = device.type == "cuda"
    traced = trace_step(
        recipe, shapes, rank=args.rank, num_styles=len(names), num_samples=min(args.micro_batch_size, 4), on_gpu=on_gpu
    )
    shared = build(args.shapes, args.width, torch.bfloat16 if args.rank else torch.float32, device, 0)
    student: AdaptedStudent | StyledStudent
    if args.rank:
        student = AdaptedStudent(shared, {names[0]: some_adapter(shared, args.rank)})
    else:
        student = StyledStudent(shared, StylePrompts(names, dim=4 * args.width), family)
    unet = freeze(build(args.shapes, args.width, torch.bfloat16, device, 1))
    teachers = {}
    for index in range(len(names)):
        one = copy.deepcopy(unet) if index else unet  # drawing 860 million weights takes seconds
        if args.compile:
            one.compile()
        teachers[index] = Teacher(one, "epsilon", "epsilon")
    roles = [Role([index], name, 1 / len(names)) for index, name in enumerate(names)]
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    batches = Batches(
        RandomData(shapes),
        names,
        roles,
        groups=share_batch(batch_size, [role.share for role in roles], 1, 0),
        process=VariancePreserving(scheduler.alphas_cumprod),
        caption_dropout=0.1,
        micro_batch_size=args.micro_batch_size,
        seed=0,
        device=device,
    )
    lesson = Imitation(place_teachers(teachers, device, num_student_bytes=0), recipe.losses.feature)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    profiled = (
        profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU])
        if args.profile
        else nullcontext()
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Unsaved(accelerator, student, lesson, batches, recipe, Path(folder), names)
        with profiled as profiler:
            trainer.train()
        log = [json.loads(line) for line in (Path(folder) / LOG).read_text(encoding="utf-8").splitlines()]
    seconds = [after["time"] - before["time"] for before, after in pairwise(log)]
    rate = batch_size / max(statistics.median(seconds[len(seconds) // 2 :]), 1e-9)
    told = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "the CPU",
        "torch": torch.__version__,
        "num_parameters": meta.num_parameters(),
        "samples_per_second": rate,
        "tflops_per_second": rate * traced.flops / 1e12,
        "peak_bytes": peak_bytes(device),
    }
    if profiler:
        told["kernels"] = longest_kernels(profiler)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
