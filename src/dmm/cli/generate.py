"""Make pictures with any stock Stable Diffusion model: a pipeline folder, a single file or a hub id.

A prompt and a seed make one picture, always the same. Several of either make a grid, prompts down and
seeds across; to get one file each, name a folder as the output.

Examples:
  dmm generate models/dreamshaper "a red cat, sitting" --output cat.png
  dmm generate v1-5.safetensors --config models/base "a red cat" "a house by the sea" --seed 0-7
  dmm generate models/base --prompts prompts.txt --count 4 --output pictures/
  dmm generate models/base "a castle" --lora ink.safetensors:0.8 --steps 30 --guidance 5

The paper's setting is 25 steps, guidance 7 and
  --negative "worst quality, low quality, normal quality, lowres, watermark, nsfw"
"""

import argparse
import itertools
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dmm.cli.arguments import (
    BAR,
    MAX_PICTURES,
    MAX_SEED,
    add_overwrite,
    read_prompts,
    read_seeds,
    write_seeds,
)
from dmm.errors import UserError
from dmm.names import nearest
from dmm.outputs import check_file, check_folder, new_folder
from dmm.samplers import DEFAULT_SAMPLER, SAMPLERS, check_multiple, check_settings

if TYPE_CHECKING:
    from PIL import Image

    from dmm.parameters import Parameters

WIDEST_ROW = 8  # pictures, where one prompt's seeds are wrapped
LARGEST_GRID = 30_000  # pixels a side: more, and common viewers give up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a stock pipeline folder, a single file or a hub id")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="what to paint; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="more prompts, one a line")
    parser.add_argument(
        "--seed", metavar="SEEDS", type=read_seeds, default=[0], help="3, 0-7, 1,2,5 or 0-3,8 (default: 0)"
    )
    parser.add_argument(
        "--count", metavar="N", type=int, help="N pictures of each prompt, the seeds counted up from --seed"
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a .png file: the picture, or a grid of several; a folder: one file each "
        "(default: a free name made of the prompt and the seeds)",
    )
    add_overwrite(parser)

    painting = parser.add_argument_group("how to paint")
    painting.add_argument("--steps", metavar="N", type=int, default=25, help="denoising steps (default: 25)")
    painting.add_argument(
        "--guidance", metavar="G", type=float, default=7.0, help="guidance scale; 1 is none (default: 7)"
    )
    painting.add_argument("--negative", metavar="TEXT", default="", help="what to lead away from (default: nothing)")
    painting.add_argument("--width", metavar="W", type=int, help="pixels (default: the model's own)")
    painting.add_argument("--height", metavar="H", type=int, help="pixels (default: the model's own)")
    painting.add_argument(
        "--sampler",
        metavar="NAME",
        type=_sampler,
        default=DEFAULT_SAMPLER,
        help=f"one of: {', '.join(SAMPLERS)} (default: {DEFAULT_SAMPLER})",
    )

    opening = parser.add_argument_group("how to open the model")
    opening.add_argument("--config", metavar="FOLDER", type=Path, help="the pipeline folder that a single file follows")
    opening.add_argument("--lora", metavar="FILE[:SCALE]", type=_lora, help="put a LoRA on the model (scale: 1)")
    opening.add_argument(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what a single file predicts, where it does not say (default: what the model says)",
    )
    opening.add_argument("--allow-pickle", action="store_true", help="open .ckpt and .bin files too")
    opening.add_argument(
        "--device", metavar="NAME", type=_device, help="cuda, cuda:1, mps or cpu (default: the best there is)"
    )
    opening.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), help="of the weights (default: fp16 on a GPU, fp32 on a CPU)"
    )
    opening.add_argument("--batch-size", metavar="N", type=int, help="pictures at a time (default: by their size)")


def run(args: argparse.Namespace) -> None:
    """Check everything, open the model, paint, write, and say what was written.

    Raises: UserError: see the options; KeyboardInterrupt: with a word on what was left behind.
    """
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    seeds = _seeds(args.seed, args.count)
    _check(args, prompts, seeds)
    output, is_folder = _output(args.output, prompts, seeds)
    (check_folder if is_folder else check_file)(output, overwrite=args.overwrite)
    try:
        _paint(args, prompts, seeds, output, is_folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None


def _paint(args: argparse.Namespace, prompts: list[str], seeds: list[int], output: Path, is_folder: bool) -> None:
    from dmm.cli.libraries import quiet_libraries

    quiet_libraries()
    import torch

    try:
        _write(args, _open(args), prompts, seeds, output, is_folder)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The device ran out of memory: give a smaller --batch-size, --width or --height, or --precision fp16."
        ) from error


def _write(
    args: argparse.Namespace, pipeline: Any, prompts: list[str], seeds: list[int], output: Path, is_folder: bool
) -> None:
    from dmm.pictures import save_png
    from dmm.sampling import picture_size, sample

    start = time.monotonic()
    _tell_of_cut_prompts(pipeline, [*prompts, args.negative])
    width, height = picture_size(pipeline, args.width, args.height)
    if not is_folder:
        _check_grid(prompts, seeds, width, height)
    whole = _parameters(args, prompts, seeds, width, height)
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    with tqdm(total=len(pairs), unit=" pictures", bar_format=BAR) as bar:
        images = sample(
            pipeline,
            [prompt for prompt, _ in pairs],
            [seed for _, seed in pairs],
            steps=args.steps,
            guidance_scale=args.guidance,
            negative_prompt=args.negative,
            width=width,
            height=height,
            sampler=args.sampler,
            batch_size=args.batch_size,
            progress=bar.update,
        )
        if is_folder:
            with new_folder(output, overwrite=args.overwrite) as folder:
                for i, (image, (prompt, seed)) in enumerate(zip(images, pairs, strict=True)):
                    name = f"{i // len(seeds) + 1:04d}-seed{seed}.png"
                    save_png(image, folder / name, replace(whole, prompt=prompt, seed=str(seed)))
        else:
            picture = next(images) if len(pairs) == 1 else _grid(list(images), prompts, seeds)
            save_png(picture, output, whole, overwrite=args.overwrite)
    count = "a picture" if len(pairs) == 1 else f"{len(pairs)} pictures"
    print(f"Wrote {output}: {count} of {width} x {height} pixels, in {time.monotonic() - start:.1f} s.")


def _check(args: argparse.Namespace, prompts: list[str], seeds: list[int]) -> None:
    """Everything that can be checked before anything heavy is imported."""
    if not prompts:
        raise UserError("There is no prompt: write one after the model, or name a file with --prompts.")
    count = len(prompts) * len(seeds)
    if count > MAX_PICTURES:
        raise UserError(
            f"{len(prompts)} prompts with {len(seeds)} seeds each are {count} pictures; {MAX_PICTURES} are the most."
        )
    check_settings(steps=args.steps, guidance_scale=args.guidance, negative_prompt=args.negative)
    for name, size in (("width", args.width), ("height", args.height)):
        if size is not None:
            check_multiple(name, size, 8)  # some models need more, which is seen once they are open
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}.")
    model = Path(args.model).expanduser()
    might_be_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", args.model) and not model.parent.exists()
    if not model.exists() and not might_be_hub_id:
        raise UserError(f"{args.model}: no such file or folder. Check the path.")
    if args.config is not None and not args.config.is_dir():
        raise UserError(f"--config {args.config}: no such folder. Name a stock pipeline folder.")
    if args.lora is not None and not args.lora[0].is_file():
        raise UserError(f"--lora {args.lora[0]}: no such file. Check the path.")


def _seeds(seeds: list[int], count: int | None) -> list[int]:
    if count is None:
        return seeds
    if len(seeds) > 1:
        raise UserError("--count counts up from one seed: give --seed one seed, or leave out --count.")
    if not 1 <= count <= MAX_PICTURES:
        raise UserError(f"--count must be from 1 to {MAX_PICTURES}, not {count}.")
    if seeds[0] + count - 1 > MAX_SEED:
        raise UserError(f"--count {count} from --seed {seeds[0]} goes beyond {MAX_SEED}, the largest seed.")
    return list(range(seeds[0], seeds[0] + count))


def _output(named: str | None, prompts: list[str], seeds: list[int]) -> tuple[Path, bool]:
    """Where to write, and whether it is a folder."""
    if named is None:
        return _free_name(prompts, seeds), False
    path = Path(named).expanduser()
    if named.endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        return path, True
    if path.suffix.lower() != ".png":
        raise UserError(
            f"--output {named}: pictures are written as PNG. Name a .png file; or a folder, with a slash at the end."
        )
    return path, False


def _free_name(prompts: list[str], seeds: list[int]) -> Path:
    words = re.sub(r"[\W_]+", "-", prompts[0].lower()).strip("-")[:40].strip("-") or "picture"
    more = f"-and-{len(prompts) - 1}-more" if len(prompts) > 1 else ""
    numbers = write_seeds(seeds)
    stem = f"{words}{more}-seed{numbers if len(numbers) <= 20 else f'{seeds[0]}-and-{len(seeds) - 1}-more'}"
    names = (f"{stem}{f'-{i}' if i else ''}.png" for i in itertools.count())
    return next(path for path in map(Path, names) if not path.exists())


def _open(args: argparse.Namespace) -> Any:
    """The model, on its device."""
    import torch

    from dmm.teachers import ModelSource, open_pipeline

    device = args.device or (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )
    kind, _, index = device.partition(":")
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}[kind]
    if int(index or 0) >= available:
        raise UserError(f"--device {device}: torch finds {available} of '{kind}' here; choose another, or cpu.")
    precision = args.precision or ("fp32" if kind == "cpu" else "fp16")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    lora, lora_scale = args.lora or (None, 1.0)
    source = ModelSource(
        args.model,
        config=args.config,
        lora=lora,
        lora_scale=lora_scale,
        prediction_type=args.prediction_type,
        allow_pickle=args.allow_pickle,
    )
    return open_pipeline(source, torch_dtype=dtype).to(device)


def _tell_of_cut_prompts(pipeline: Any, prompts: list[str]) -> None:
    from dmm.sampling import unread

    cut = {prompt: rest for prompt in prompts if (rest := unread(pipeline, prompt))}
    if cut:
        prompt, rest = next(iter(cut.items()))
        others = f" ({len(cut)} prompts are too long)" if len(cut) > 1 else ""
        print(f"dmm: note: the model does not read the end of '{prompt[:40]}...': '{rest}'{others}", file=sys.stderr)


def _parameters(
    args: argparse.Namespace, prompts: list[str], seeds: list[int], width: int, height: int
) -> "Parameters":
    from dmm.files import sha256
    from dmm.parameters import Parameters, model_hash

    model = Path(args.model).expanduser()
    lora, lora_scale = args.lora or (None, 1.0)
    return Parameters(
        prompt="\n".join(prompts),
        negative_prompt=args.negative,
        steps=args.steps,
        sampler=args.sampler,
        guidance_scale=args.guidance,
        seed=write_seeds(seeds),
        width=width,
        height=height,
        model=model.resolve().stem if model.is_file() else model.resolve().name,
        model_hash=model_hash(model),
        lora=lora.stem if lora else None,
        lora_scale=lora_scale,
        lora_hash=sha256(lora)[:10] if lora else None,
    )


def _rows(prompts: list[str], seeds: list[int]) -> tuple[int, int]:
    """Rows and columns of the grid: prompts down, seeds across; one prompt's seeds are wrapped."""
    if len(prompts) > 1:
        return len(prompts), len(seeds)
    columns = min(len(seeds), WIDEST_ROW)
    return -(-len(seeds) // columns), columns


def _check_grid(prompts: list[str], seeds: list[int], width: int, height: int) -> None:
    num_rows, num_columns = _rows(prompts, seeds)
    if max(num_rows * height, num_columns * width) > LARGEST_GRID:
        raise UserError(
            f"A grid of {num_rows} x {num_columns} pictures of {width} x {height} pixels is too large to look at; "
            "name a folder as --output, and each gets a file of its own."
        )


def _grid(images: list["Image.Image"], prompts: list[str], seeds: list[int]) -> "Image.Image":
    from dmm.pictures import grid

    num_rows, num_columns = _rows(prompts, seeds)
    if len(prompts) == 1 and num_rows > 1:
        starts = range(0, len(seeds), num_columns)
        labels = [f"seeds {write_seeds(seeds[start : start + num_columns])}" for start in starts]
        return grid(images, num_columns, row_labels=labels)
    return grid(images, num_columns, row_labels=prompts, column_labels=[f"seed {seed}" for seed in seeds])


def _sampler(text: str) -> str:
    names = {name.lower(): name for name in SAMPLERS}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(
            f"there is no sampler '{text}'{nearest(text, SAMPLERS)}; choose from {', '.join(SAMPLERS)}"
        )
    return names[text.lower()]


def _device(text: str) -> str:
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", text):
        raise argparse.ArgumentTypeError(f"there is no device '{text}'; choose cuda, cuda:1, mps or cpu")
    return text


def _lora(text: str) -> tuple[Path, float]:
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", text)
    return (Path(match[1]).expanduser(), float(match[2])) if match else (Path(text).expanduser(), 1.0)
