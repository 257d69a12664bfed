"""Train a student of SD 1.5's size on random weights, and print what it takes: memory and time.

The UNet has SD 1.5's configuration (860 M parameters), latents and texts its shapes; their values are random, which
changes neither memory nor time. No VAE and no text encoder is there: none runs in the training loop.

  python benchmarks/full_size.py                                       two teachers, batch 2, on the CPU: 24 GB do
  python benchmarks/full_size.py --rank 16                             the same with adapters: 8 GB do
  python benchmarks/full_size.py --rank 16 --calibrate --samples 16    what comes before: a teacher calibrated
  python benchmarks/full_size.py --width 64                            narrow, to try the script
  python benchmarks/full_size.py --teachers 8 --batch-size 20 --steps 12 --no-gradient-checkpointing      on a GPU

Against 24 GB, with adapters 8 GB, and 12 GB for a calibration, on the CPU; a GPU's figures stand for themselves.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from dmm.families.sd1 import SD1
from dmm.maths.processes import VariancePreserving
from dmm.maths.sharing import share_batch
from dmm.models.adapters import Adapter, Factors
from dmm.models.calibration import layers_of
from dmm.models.student import AdaptedStudent, StyledStudent
from dmm.models.styles import StylePrompts
from dmm.models.teachers import freeze
from dmm.recipes.recipe import Recipe
from dmm.training.batches import Batches, Role
from dmm.training.calibrating import Sample, calibrate
from dmm.training.distill import Imitation, Teacher
from dmm.training.residency import place_teachers
from dmm.training.trainer import LOG, Trainer

SD15_WIDTH = 320
LIMIT, ADAPTED_LIMIT, CALIBRATION_LIMIT = 24e9, 8e9, 12e9  # bytes
ACTIVATIONS = 2e9  # bytes, a guess for two samples, with what Python takes


class RandomData:
    """Latents and texts of SD 1.5's shapes.

    Args:
        size: of the pictures, pixels a side.
    """

    num_rows = 64

    def __init__(self, size: int) -> None:
        self.latent_shape = (4, size // 8, size // 8)
        generator = torch.Generator().manual_seed(0)
        self._latents = torch.randn(self.num_rows, *self.latent_shape, generator=generator)
        self._text = torch.randn(self.num_rows, 77, 768, generator=generator)

    def rows_of(self, _painter: str) -> Tensor:
        """None: they are everyone's."""
        return torch.arange(0)

    def latents(self, rows: Tensor) -> Tensor:
        """(B, 4, H, W)."""
        return self._latents[rows]

    def shown(self, _rows: Tensor, _styles: Sequence[str]) -> dict[str, Tensor]:
        """Nothing: the UNet reads no more."""
        return {}

    @property
    def sizes(self) -> list[Tensor]:
        """All rows are of one."""
        return [torch.arange(self.num_rows)]

    def conditioning(self, _encoder: str, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """(B, 77, 768)."""
        return {"encoder_hidden_states": self._text[rows] * ~dropped[:, None, None]}


class Unsaved(Trainer):
    """A trainer whose checkpoints, of 10 GB, are left out."""

    def _save(self, done: int) -> None:
        pass


def build_unet(width: int, dtype: torch.dtype, device: torch.device, seed: int) -> UNet2DConditionModel:
    """SD 1.5's UNet, made where it stays and as what it stays: no copy in another precision ever exists."""
    torch.manual_seed(seed)
    with default_dtype(dtype), device:
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            attention_head_dim=8,  # the number of heads, as SD 1.5's config has it
            cross_attention_dim=768,
        )
    unet.to(memory_format=torch.channels_last)
    return unet


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, new tensors are of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def peak_bytes(device: torch.device) -> int:
    """The most memory that was ever taken: of the GPU by tensors, or by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=2, help="in bfloat16, all resident")
    parser.add_argument("--batch-size", type=int, default=2, help="computed at once")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--steps", type=int, default=2, help="the first makes AdamW's moments, the second has all")
    parser.add_argument("--width", type=int, default=SD15_WIDTH, help="channels of the first block; a multiple of 32")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rank", type=int, default=0, help="of adapters; 0: style prompts")
    parser.add_argument("--calibrate", action="store_true", help="a teacher, in place of training")
    parser.add_argument("--samples", type=int, default=16, help="that it is calibrated on")
    args = parser.parse_args()

    prefer_to_end_this_process()
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    device = accelerator.device
    if args.calibrate:
        sys.exit(calibrate_one(args, accelerator))
    with torch.device("meta"):
        num_parameters = build_unet(args.width, torch.float32, torch.device("meta"), 0).num_parameters()
    trained = 0 if args.rank else num_parameters
    parts = {
        **({"shared weights, bfloat16": 2 * num_parameters} if args.rank else {"student, float32": 4 * trained}),
        "gradients": 4 * trained,
        "AdamW's moments": 8 * trained,
        f"{args.teachers} teachers, bfloat16": 2 * args.teachers * num_parameters,
    }
    expected = sum(parts.values())
    print(f"{num_parameters / 1e6:.0f} M parameters on {device}, {torch.get_num_threads()} threads")
    print("  ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items()) + f"  sum {expected / 1e9:.2f} GB")
    if device.type == "cpu" and psutil.virtual_memory().available < expected + ACTIVATIONS:
        available = psutil.virtual_memory().available
        sys.exit(f"{available / 1e9:.1f} GB are free, about {(expected + ACTIVATIONS) / 1e9:.1f} GB are needed.")

    names = [f"teacher {index}" for index in range(args.teachers)]
    recipe = Recipe.model_validate(
        {
            "base": "random/base",
            "teachers": [{"name": name, "model": "random/teacher"} for name in names],
            "data": {"dataset": "random/data"},
            "size": args.size,
            "styles": {"rank": args.rank},
            "training": {
                **{"steps": args.steps, "batch_size": args.batch_size, "micro_batch_size": args.batch_size},
                **{"gradient_checkpointing": args.gradient_checkpointing, "compile": args.compile},
            },
            "losses": {"adversarial": 0},
            "logging": {"every": 1, "sample_every": None},
        }
    )
    student: AdaptedStudent | StyledStudent
    if args.rank:
        shared = build_unet(args.width, torch.bfloat16, device, 0)
        student = AdaptedStudent(shared, {name: some_adapter(shared, args.rank) for name in names})
    else:
        shared = build_unet(args.width, torch.float32, device, 0)
        student = StyledStudent(shared, StylePrompts(names, dim=4 * args.width), SD1)
    teachers = {}
    for index in range(args.teachers):
        unet = freeze(build_unet(args.width, torch.bfloat16, device, 1 + index))
        if args.compile:
            unet.compile()
        teachers[index] = Teacher(unet, "epsilon", "epsilon")
    print(f"built, {peak_bytes(device) / 1e9:.2f} GB", flush=True)
    roles = [Role([index], name, 1 / args.teachers) for index, name in enumerate(names)]
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    batches = Batches(
        RandomData(args.size),
        names,
        roles,
        groups=share_batch(args.batch_size, [role.share for role in roles], 1, 0),
        process=VariancePreserving(scheduler.alphas_cumprod),
        caption_dropout=recipe.training.caption_dropout,
        micro_batch_size=args.batch_size,
        seed=0,
        device=device,
    )
    with tempfile.TemporaryDirectory() as folder:
        placed = place_teachers(teachers, device, num_student_bytes=0)
        lesson = Imitation(placed, recipe.losses.feature)
        Unsaved(accelerator, student, lesson, batches, recipe, Path(folder), names).train()
        log = [json.loads(line) for line in (Path(folder) / LOG).read_text(encoding="utf-8").splitlines()]
    for entry in log:
        print(f"step {entry['step']}: score {entry['score']:.4f}, feature {entry['feature']:.4f}")
    seconds = [after["time"] - before["time"] for before, after in pairwise(log)]
    seconds = seconds[len(seconds) // 2 :]  # the first ones warm up
    step = statistics.median(seconds)
    peak = peak_bytes(device)
    print(f"a step takes {step:.2f} s: {args.batch_size / step:.2f} samples/s")
    print(f"peak memory {peak / 1e9:.2f} GB, of which weights, gradients and moments are {expected / 1e9:.2f} GB")
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}; reserved {torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB")
    else:
        limit = ADAPTED_LIMIT if args.rank else LIMIT
        sys.exit(0 if peak < limit else f"more than {limit / 1e9:.0f} GB")


def calibrate_one(args: argparse.Namespace, accelerator: Accelerator) -> str | int:
    """Calibrate a teacher; returns the exit status."""
    start = freeze(build_unet(args.width, torch.float32, accelerator.device, 0))
    teacher = freeze(build_unet(args.width, torch.float32, accelerator.device, 0))
    torch.manual_seed(1)
    for parameter in teacher.parameters():
        parameter += 0.1 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    data, one_by_one = RandomData(args.size), range(args.samples)
    print(f"built, {peak_bytes(accelerator.device) / 1e9:.2f} GB", flush=True)

    def samples() -> Iterator[Sample]:
        for index in one_by_one:
            row = torch.tensor([index % data.num_rows])
            text = data.conditioning("", row, torch.zeros(1, dtype=torch.bool))
            x_t, text = (
                data.latents(row).to(accelerator.device),
                {name: one.to(accelerator.device) for name, one in text.items()},
            )
            timesteps = torch.tensor([1000 * index // args.samples], device=accelerator.device)
            yield Sample(x_t, timesteps, text, timesteps, text)

    begun = time.monotonic(), time.process_time()
    with accelerator.autocast():
        found = calibrate(teacher, start, samples, seed=0, max_rank=8 * (args.rank or 16), own={})
    seconds, of_cpu = time.monotonic() - begun[0], time.process_time() - begun[1]
    peak = peak_bytes(accelerator.device)
    print(f"{len(found.components)} layers on {args.samples} samples: {seconds:.0f} s, {of_cpu:.0f} s of CPU time")
    print(f"peak memory {peak / 1e9:.2f} GB")
    is_cpu = accelerator.device.type == "cpu"
    return f"more than {CALIBRATION_LIMIT / 1e9:.0f} GB" if is_cpu and peak > CALIBRATION_LIMIT else 0


def some_adapter(unet: UNet2DConditionModel, rank: int) -> Adapter:
    """An adapter that nobody trained, of one rank in every layer."""
    factors = {}
    for name, layer in layers_of(unet).items():
        weight = layer.get_parameter("weight")
        size = min(rank, weight.shape[0], weight[0].numel())
        up, down = 0.01 * torch.randn(weight.shape[0], size), 0.01 * torch.randn(size, *weight.shape[1:])
        factors[name] = Factors(up, down)
    offsets = {name: torch.zeros(one.shape) for name, one in unet.named_parameters() if name not in factors}
    return Adapter(factors, offsets)


def prefer_to_end_this_process() -> None:
    """Where memory runs out, Linux shall end this process rather than another one."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000", encoding="utf-8")


if __name__ == "__main__":
    main()
