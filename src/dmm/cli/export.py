"""Write a style of a merged model, or all of them, as checkpoints that other tools open.

A .safetensors output is one file of the original Stable Diffusion layout, as A1111, Forge, ComfyUI and
`from_single_file` open it; any other output is a diffusers folder. Same seed, same picture as with --style.

Examples:
  dmm export merged --style ink --output ink.safetensors
  dmm export merged --style ink=0.7,photo=0.3 --output ink-photo/ --precision fp16
  dmm export merged --all --output all/                   # loras/ink.safetensors is for web UIs, too
  dmm export merged --all --single-file --output all/
  dmm export merged --authors --output dmm/
  dmm export controls --style canny --output canny/       # of merged ControlNets, a control: a stock ControlNet
"""

import argparse
import sys
import time
from pathlib import Path

from dmm.cli.arguments import add_device, add_overwrite
from dmm.cli.hardware import check_device
from dmm.cli.opening import check_there
from dmm.cli.style_options import read_mix, write_style
from dmm.errors import UserError
from dmm.files.claims import claimed
from dmm.files.outputs import check_file, check_new_folder
from dmm.files.runs import holds_net
from dmm.maths.mixes import mix_weights
from dmm.models.style_names import read_style_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MERGED", help="a merged model: a folder, a hub id, or a file of the authors")
    what = parser.add_argument_group("what (one of these options)").add_mutually_exclusive_group(required=True)
    what.add_argument("--style", metavar="NAME[=W],...", type=read_mix, help="one style, or a mix as in a=0.7,b=0.3")
    what.add_argument("--all", action="store_true", help="one checkpoint, and each style as a small patch and a LoRA")
    what.add_argument("--authors", action="store_true", help="all styles, in the layout that DMM's authors released")
    parser.add_argument("--output", metavar="PATH", type=Path, required=True, help="a .safetensors file, or a folder")
    parser.add_argument("--single-file", action="store_true", help="with --all: the checkpoint as a single file")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the written weights (default: fp32)"
    )
    parser.add_argument(
        "--config",
        metavar="FOLDER",
        type=Path,
        help="the pipeline folder that a single file follows (default: what it says, or its family's, from the hub)",
    )
    add_device(parser)
    add_overwrite(parser)


def run(args: argparse.Namespace) -> None:
    """Check everything, open the model, write, and say what was written.

    Raises: UserError: see the options; KeyboardInterrupt: with a word on what was left behind.
    """
    output = args.output.expanduser()
    is_file = output.suffix == ".safetensors"
    if args.single_file and not args.all:
        raise UserError("--single-file goes with --all; of --style and --authors the output's suffix tells the kind.")
    if args.all and is_file:
        raise UserError(f"--output {args.output}: --all writes a folder, with the styles' files in it; name a folder.")
    check_there(args.model)
    check_device(args.device)
    names = read_style_names(args.model)
    if names and args.style:
        mix_weights(names, args.style)
    with claimed(output):
        (check_file if is_file else check_new_folder)(output, overwrite=args.overwrite)
        try:
            _export(args, output)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("nothing was written") from None


def _export(args: argparse.Namespace, output: Path) -> None:
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    import torch

    from dmm.formats.schedules import untold_by_marks
    from dmm.models.devices import find_device
    from dmm.models.teachers import ModelSource, locate
    from dmm.pipeline.export import export_all, export_authors, export_style
    from dmm.pipeline.styled import load_pipeline, read_styles, style_names

    start = time.monotonic()
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
    if holds_net(Path(args.model).expanduser()):
        from dmm.pipeline.controls import export_control, load_controls

        if not args.style:
            raise UserError("Of merged ControlNets a control is exported: name it, or a mix, with --style.")
        export_control(load_controls(args.model), args.style, output, dtype=dtype, overwrite=args.overwrite)
        what = f"the control {write_style(args.style)} as a stock ControlNet"
        print(f"Wrote {output}: {what}, {args.precision}, in {time.monotonic() - start:.1f} s.")
        return
    path = locate(ModelSource(args.model))
    prompts = read_styles(path)
    if prompts is not None and args.style:
        mix_weights(prompts.names, args.style)  # before the weights are loaded
    pipe = load_pipeline(path, config=args.config, device=find_device(args.device) if args.device else None)
    if args.style:
        export_style(pipe, args.style, output, dtype=dtype, overwrite=args.overwrite)
        what = f"the style {write_style(args.style)} as a stock checkpoint"
    elif args.all:
        made = export_all(pipe, output, single_file=args.single_file, dtype=dtype, overwrite=args.overwrite)
        kind = "a LoRA" if made.are_loras else "a difference"
        what = f"one checkpoint, and of each of {len(style_names(pipe))} styles a patch in styles/, {kind} in loras/"
        if not made.are_loras:
            print(
                "dmm: note: what embeds time is too narrow here for styles to be LoRAs of rank one: their terms would "
                f"be {made.error:.1%} off. loras/ has them as differences (.diff_b), which ComfyUI reads, and for "
                "diffusers, exact, in loras/diffusers/.",
                file=sys.stderr,
            )
    else:
        export_authors(pipe, output, dtype=dtype, overwrite=args.overwrite)
        what = f"{len(style_names(pipe))} styles in the layout of DMM's authors"
    note = untold_by_marks(pipe.scheduler.config)
    if note and (output.suffix == ".safetensors" or args.single_file):
        print(f"dmm: note: {note}.", file=sys.stderr)
    print(f"Wrote {output}: {what}, {args.precision}, in {time.monotonic() - start:.1f} s.")
