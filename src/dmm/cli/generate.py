r"""Make pictures with a merged model in its styles, or with any stock Stable Diffusion model.

The model is a pipeline folder, a single file or a hub id. A prompt, a seed and a style make one picture,
always the same. Several of them make a grid: prompts down and seeds across, or several styles across; to
get one file each, name a folder as the output.

Examples:
  dmm generate models/dreamshaper "a red cat, sitting" --output cat.png
  dmm generate v1-5.safetensors "a red cat" "a house by the sea" --seed 0-7
  dmm generate models/base --prompts prompts.txt --count 4 --output pictures/
  dmm generate models/base "a castle" --lora ink.safetensors:0.8 --lora detail.safetensors:0.4 --steps 30
  dmm generate merged "a red cat" --style ink
  dmm generate merged "a red cat" --style ink=0.7,photo=0.3
  dmm generate merged "a red cat" "a castle" --styles all --output styles.png
  dmm generate merged-fast "a red cat" --style ink --steps 2
  dmm generate merged "a red cat" --style ink --lora lcm-lora.safetensors --sampler LCM --guidance 1 --steps 4
  dmm generate merged "a red cat" --strip ink,photo --count 11
  dmm generate merged "a red cat" --pairs
  dmm generate merged "a red cat" --style "0-0.4:ink;0.4-1:photo"
  dmm generate merged "a red cat" --style ink --region "0.5,0,1,1:photo" --region "mask.png:clay:a blue dog"
  dmm generate merged "a village" --styles ink,photo,clay --panorama 2048
  dmm generate merged "a red cat" --style ink --controlnet canny/ --control-image edges.png
  dmm generate merged "a red cat" --styles all --controlnet controls/ --control canny --control-image edges.png \
      --control depth --control-image depth.png --output styles-and-controls.png
  dmm generate merged "a red cat" --style ink --image sketch.png --strength 0.6 --mask mask.png
  dmm generate merged "a red cat" --style ink --ip-adapter ip-adapter_sd15.safetensors:0.6 --ip-image cat.jpg

The paper's setting is 25 steps, guidance 7 and
  --negative "worst quality, low quality, normal quality, lowres, watermark, nsfw"
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmm.cli.arguments import (
    MAX_PICTURES,
    MAX_SEED,
    add_overwrite,
    read_seeds,
    write_seeds,
)
from dmm.cli.few_step_options import DEFAULT_GUIDANCE, DEFAULT_STEPS, assumed, settle
from dmm.cli.layout import Layout, Picture, lay_out, lay_out_pairs, list_pictures, stack
from dmm.cli.opening import add_opening_options, check_opening, find_dtype, open_model, place_model, read_source
from dmm.cli.output_names import name_output
from dmm.cli.plugin_options import add_plugin_options, by_control, check_plugins, describe_plugins, read_plugins
from dmm.cli.region_options import add_region_options, asks_for_regions, check_regions, describe_regions, regions_of
from dmm.cli.style_options import Style, add_style_options, asks_for_styles, choose_styles, write_style
from dmm.errors import UserError, nearest, one_line
from dmm.files.bars import PartsBar
from dmm.files.few_steps import STEPS
from dmm.files.outputs import check_file, check_folder, new_files
from dmm.files.prompts import read_prompts, web_ui_syntax
from dmm.models.style_names import read_style_names
from dmm.pipeline.samplers import DEFAULT_SAMPLER, SAMPLERS, check_multiple, check_settings
from dmm.pipeline.style_schedule import StyleSchedule, check_style

if TYPE_CHECKING:
    from PIL import Image

    from dmm.files.parameters import Parameters

LARGEST_GRID = 30_000  # pixels a side: more, and common viewers give up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="a pipeline folder, a single file or a hub id")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="what to paint; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="more prompts, one a line")
    parser.add_argument(
        "--seed", metavar="SEEDS", type=read_seeds, default=[0], help="3, 0-7, 1,2,5 or 0-3,8 (default: 0)"
    )
    parser.add_argument(
        "--count",
        metavar="N",
        type=int,
        help="N pictures of each prompt, the seeds counted up from --seed; of --strip, N steps",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a .png file: the picture, or a grid of several; a folder: one file each "
        "(default: a free name made of the prompt and the seeds)",
    )
    add_overwrite(parser)
    add_style_options(parser)
    add_region_options(parser)
    add_plugin_options(parser)

    painting = parser.add_argument_group("how to paint")
    painting.add_argument(
        "--steps", metavar="N", type=int, help=f"denoising steps (default: {DEFAULT_STEPS}; of few-step models {STEPS})"
    )
    painting.add_argument(
        "--guidance",
        metavar="G",
        type=float,
        help=f"guidance scale; 1 is none (default: {DEFAULT_GUIDANCE:g}; of few-step models as they say)",
    )
    painting.add_argument("--negative", metavar="TEXT", default="", help="what to lead away from (default: nothing)")
    painting.add_argument("--width", metavar="W", type=int, help="pixels (default: the model's own)")
    painting.add_argument("--height", metavar="H", type=int, help="pixels (default: the model's own)")
    painting.add_argument(
        "--sampler",
        metavar="NAME",
        type=_sampler,
        help=f"one of: {', '.join(SAMPLERS)} (default: {DEFAULT_SAMPLER}; of few-step models as they say)",
    )
    painting.add_argument("--batch-size", metavar="N", type=int, help="pictures at a time (default: by their size)")
    add_opening_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check everything, open the model, paint, write, and say what was written.

    Raises: UserError: see the options; KeyboardInterrupt: with a word on what was left behind.
    """
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    seeds = _seeds(args)
    _check(assumed(args), prompts, seeds)
    output, is_folder = name_output(args, prompts, seeds)
    (check_folder if is_folder else check_file)(output, overwrite=args.overwrite)
    names = read_style_names(args.model)
    if names is not None:
        _check_count(len(prompts), len(seeds), len(_styles(args, names)))
    if args.pairs and not is_folder and len(prompts) * len(seeds) > 1:
        raise UserError("--pairs makes a grid of one prompt and one seed; name a folder as --output for more.")
    try:
        _paint(args, prompts, seeds, output, is_folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None


def _paint(args: argparse.Namespace, prompts: list[str], seeds: list[int], output: Path, is_folder: bool) -> None:
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    import torch

    names, title, open_it = _find_model(args)
    styles = _styles(args, names)
    if names and styles == [None] and not asks_for_regions(args):
        print(
            f"dmm: note: without --style a merged model paints none of its styles: {', '.join(names)}", file=sys.stderr
        )
    _check_count(len(prompts), len(seeds), len(styles))
    pictures = list_pictures(prompts, seeds, styles)
    layout = None if is_folder else lay_out_pairs(names) if args.pairs else lay_out(prompts, seeds, styles)
    try:
        _write(args, open_it(), title, pictures, layout, output)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The device ran out of memory: give a smaller --batch-size, --width or --height, or --precision fp16."
        ) from error


def _find_model(args: argparse.Namespace) -> tuple[list[str], str, Callable[[], Any]]:
    """The model's styles, what pictures call it, and what opens it."""
    model = Path(args.model).expanduser()
    if args.from_checkpoint:
        from dmm.training.preview import find_preview, open_preview

        preview = find_preview(model)
        settle(args, None)
        print(f"dmm: note: painting with {preview.checkpoint}", file=sys.stderr)
        title = f"{model.resolve().name} {preview.checkpoint.name}"
        return preview.styles, title, lambda: open_preview(preview, torch_dtype=find_dtype(args))
    from dmm.models.teachers import locate
    from dmm.pipeline.styled import read_styles

    source = read_source(args)
    path = locate(source)
    settle(args, path)
    style_prompts = read_styles(path, allow_pickle=args.allow_pickle)
    title = model.resolve().stem if model.is_file() else model.resolve().name
    names = style_prompts.names if style_prompts else []
    return names, title, lambda: open_model(args, replace(source, model=path), style_prompts)


def _write(
    args: argparse.Namespace,
    pipeline: Any,
    title: str,
    pictures: list[Picture],
    layout: Layout | None,
    output: Path,
) -> None:
    """Paint, and write the grid that ``layout`` tells of, or each picture on its own where there is none."""
    from dmm.files.picture_reader import open_picture
    from dmm.files.pictures import grid, save_png
    from dmm.pipeline.plugins import add_plugins
    from dmm.pipeline.sampling import picture_size, usual_batch_size

    start = time.monotonic()
    prompts = [*dict.fromkeys(picture.prompt for picture in pictures), args.negative]
    _tell_of_cut_prompts(pipeline, prompts)
    _tell_of_foreign_syntax(prompts)
    controls, beginning, ip_adapter = read_plugins(args)
    pipeline, inputs = add_plugins(
        pipeline, controls=controls, start=beginning, ip_adapter=ip_adapter, by_turns=by_control(args)
    )
    turns: list[Any] = list(controls) if by_control(args) else [None]
    if by_control(args):
        named = [write_style(control) for control in args.control]
        layout = layout and stack(layout, named, "follows")
        pictures = [replace(picture, file_name=f"{name}-{picture.file_name}") for name in named for picture in pictures]
    place_model(args, pipeline)
    width, height = args.panorama or args.width, args.height
    if beginning is not None and width is height is None:
        width, height = (max(8, side // 8 * 8) for side in open_picture(beginning.image).size)
    width, height = picture_size(pipeline, width, height)
    batch_size = args.batch_size
    if batch_size is None and (args.style or args.styles):
        # a prompt in all its styles is one pass, whatever its size
        num_styles = len({write_style(picture.style) for picture in pictures if picture.style})
        batch_size = max(usual_batch_size(width, height), num_styles)
    if layout:
        _check_grid(layout, width, height)
    whole = _parameters(args, pipeline, title, pictures, width, height)
    with PartsBar(len(pictures), " pictures") as bar:
        settings = {
            "steps": args.steps,
            "guidance_scale": args.guidance,
            "negative_prompt": args.negative,
            "width": width,
            "height": height,
            "sampler": args.sampler,
            "batch_size": batch_size,
            "progress": bar.update,
        }
        each = len(pictures) // len(turns)
        images = itertools.chain.from_iterable(
            _images(
                args,
                pipeline,
                pictures[i * each : (i + 1) * each],
                inputs=partial(inputs, size=(width, height), **({} if turn is None else {"follows": turn})),
                **settings,
            )
            for i, turn in enumerate(turns)
        )
        if layout is None:
            with new_files(output, overwrite=args.overwrite) as folder:
                for image, picture in zip(images, pictures, strict=True):
                    parameters = replace(whole, prompt=picture.prompt, seed=str(picture.seed), style=_told([picture]))
                    save_png(image, folder / picture.file_name, parameters)
        elif len(layout.cells) == 1:
            save_png(next(images), output, whole, overwrite=args.overwrite)
        else:
            painted = list(images)
            if by_control(args):
                painted += [open_picture(control.image).resize((width, height)) for control in controls]
            picture_grid = grid(
                [painted[i] for i in layout.cells],
                layout.num_columns,
                row_labels=layout.row_labels,
                column_labels=layout.column_labels,
            )
            save_png(picture_grid, output, whole, overwrite=args.overwrite)
    count = "a picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    print(f"Wrote {output}: {count} of {width} x {height} pixels, in {time.monotonic() - start:.1f} s.")


def _images(
    args: argparse.Namespace, pipeline: Any, pictures: list[Picture], **settings: Any
) -> "Iterator[Image.Image]":
    from dmm.pipeline.sampling import sample

    if asks_for_regions(args):
        return _paint_regions(args, pipeline, pictures, **settings)
    return sample(
        pipeline,
        [picture.prompt for picture in pictures],
        [picture.seed for picture in pictures],
        styles=[picture.style for picture in pictures] if pictures[0].style else None,
        **settings,
    )


def _paint_regions(
    args: argparse.Namespace, pipeline: Any, pictures: list[Picture], **settings: Any
) -> "Iterator[Image.Image]":
    """Each picture with the same regions; its own style is that of what no region covers."""
    from dmm.pipeline.regions import paint_regions
    from dmm.pipeline.styled import style_names

    regions = regions_of(args, style_names(pipeline), settings["width"], settings["height"])
    for picture in pictures:
        assert not isinstance(picture.style, StyleSchedule)  # see check_regions
        yield paint_regions(
            pipeline,
            regions,
            picture.prompt,
            style=picture.style,
            seed=picture.seed,
            tile=args.tile,
            **settings,
        )


def _check(args: argparse.Namespace, prompts: list[str], seeds: list[int]) -> None:
    """Everything that can be checked before anything heavy is imported."""
    if not prompts:
        raise UserError("There is no prompt: write one after the model, or name a file with --prompts.")
    _check_count(len(prompts), len(seeds))
    check_settings(steps=args.steps, guidance_scale=args.guidance, negative_prompt=args.negative)
    for name, size in (("width", args.width), ("height", args.height)):
        if size is not None:
            check_multiple(name, size, 8)  # some models need more, which is seen once they are open
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {args.batch_size}.")
    check_opening(args)
    check_plugins(args)
    check_regions(args)


def _styles(args: argparse.Namespace, names: list[str]) -> list[Style] | list[None]:
    """The styles to paint each prompt in, of a model that has ``names``; None is without one.

    Raises: UserError: it has no styles, or not those.
    """
    if (asks_for_styles(args) or args.region) and not names:
        raise UserError(f"{args.model} is a stock model without styles. Name a merged model, or leave out the styles.")
    styles = choose_styles(args, names) if asks_for_styles(args) else None
    for region in args.region:
        check_style(names, region.style)
    return [None] if styles is None or args.panorama else styles  # a panorama's are of parts of each picture


def _check_count(num_prompts: int, num_seeds: int, num_styles: int = 1) -> None:
    count = num_prompts * num_seeds * num_styles
    if count > MAX_PICTURES:
        styles = f" in {num_styles} styles" if num_styles > 1 else ""
        raise UserError(
            f"{num_prompts} prompts with {num_seeds} seeds each{styles} are {count} pictures; "
            f"{MAX_PICTURES} are the most."
        )


def _seeds(args: argparse.Namespace) -> list[int]:
    seeds: list[int] = args.seed
    if args.count is None:
        return seeds
    if args.strip:
        if not 2 <= args.count <= MAX_PICTURES:
            raise UserError(f"--strip takes a --count from 2 to {MAX_PICTURES}, not {args.count}.")
        return seeds
    if len(seeds) > 1:
        raise UserError("--count counts up from one seed: give --seed one seed, or leave out --count.")
    if not 1 <= args.count <= MAX_PICTURES:
        raise UserError(f"--count must be from 1 to {MAX_PICTURES}, not {args.count}.")
    if seeds[0] + args.count - 1 > MAX_SEED:
        raise UserError(f"--count {args.count} from --seed {seeds[0]} goes beyond {MAX_SEED}, the largest seed.")
    return list(range(seeds[0], seeds[0] + args.count))


def _tell_of_cut_prompts(pipeline: Any, prompts: list[str]) -> None:
    from dmm.pipeline.sampling import unread

    cut = {prompt: rest for prompt in prompts if (rest := unread(pipeline, prompt))}
    if cut:
        prompt, rest = next(iter(cut.items()))
        others = f" ({len(cut)} prompts are too long)" if len(cut) > 1 else ""
        print(f"dmm: note: the model does not read the end of '{prompt[:40]}...': '{rest}'{others}", file=sys.stderr)


def _tell_of_foreign_syntax(prompts: list[str]) -> None:
    found = web_ui_syntax(prompts)
    if found:
        others = f" ({len(found)} such)" if len(found) > 1 else ""
        print(
            f"dmm: note: '{one_line(found[0])}'{others} in a prompt is painted as the words that it is: weights and "
            "LoRAs within prompts are other tools'; LoRAs are put on a model with --lora",
            file=sys.stderr,
        )


def _parameters(
    args: argparse.Namespace, pipeline: Any, title: str, pictures: list[Picture], width: int, height: int
) -> "Parameters":
    from dmm.families import family_of
    from dmm.files.parameters import Parameters, UsedLora, lora_hash, model_hash
    from dmm.formats.lora import lora_file

    model, denoiser = Path(args.model).expanduser(), family_of(pipeline).denoiser.name
    return Parameters(
        prompt="\n".join(dict.fromkeys(picture.prompt for picture in pictures)),
        negative_prompt=args.negative,
        steps=args.steps,
        sampler=args.sampler,
        guidance_scale=args.guidance,
        seed=write_seeds(list(dict.fromkeys(picture.seed for picture in pictures))),
        width=width,
        height=height,
        model=title,
        model_hash=None if args.from_checkpoint else model_hash(model, denoiser),
        style=_told(pictures),
        loras=[UsedLora(path.stem, scale, lora_hash(lora_file(path))) for path, scale in args.loras],
        plugins=describe_plugins(args) | describe_regions(args),
    )


def _told(pictures: list[Picture]) -> str | None:
    """The pictures' styles as text, each once."""
    return "; ".join(dict.fromkeys(write_style(picture.style) for picture in pictures if picture.style)) or None


def _check_grid(layout: Layout, width: int, height: int) -> None:
    if max(layout.num_rows * height, layout.num_columns * width) > LARGEST_GRID:
        raise UserError(
            f"A grid of {layout.num_rows} x {layout.num_columns} pictures of {width} x {height} pixels is too large to "
            "look at; name a folder as --output, and each gets a file of its own."
        )


def _sampler(text: str) -> str:
    names = {name.lower(): name for name in SAMPLERS}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(
            f"there is no sampler '{text}'{nearest(text, SAMPLERS)}; choose from {', '.join(SAMPLERS)}"
        )
    return names[text.lower()]
