"""Merge fine-tuned models into one that paints in all their styles, by distillation.

A recipe says what is merged, on what data and how. The smallest one, whose teachers paint their own data:

  base: models/base                     # its VAE, text encoder and start become the student's
  teachers:
    - {name: ink, model: models/ink}    # a pipeline folder, a single file or a hub id
    - {name: photo, lora: photo.safetensors, lora_scale: 0.8}
  data:
    synthesize: {prompts: prompts.txt, count: 1500}   # or {images: folder}, captioned; or {dataset: id}
  styles: {rank: 16}                                  # adapters on the base's own weights: the default

Each style becomes an adapter, a low-rank change of frozen weights. With styles: {rank: 0} it is a vector and all
weights are trained, by the paper's values: recipes/paper.yaml. docs/merge.md has the two side by side, and tells of
every key. All of it is checked before anything large is loaded.

DIR gets the run (recipe.yaml, log.jsonl, samples/, checkpoints/) and at the end the result: a stock pipeline
folder with the styles beside it, which dmm generate DIR --style ink paints with. Stopped in any way, a run goes
on from its last checkpoint with --resume.

Examples:
  dmm merge --new models                                            # a recipe for what is in that folder
  dmm merge recipe.yaml --output merged
  dmm merge recipe.yaml --output merged --resume
  dmm merge recipe.yaml --output try --set training.steps=100 --set losses.feature=0.1
  accelerate launch -m dmm merge recipe.yaml --output merged        # on many GPUs
"""

import argparse
import gc
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmm.cli.arguments import add_device
from dmm.cli.hardware import check_device
from dmm.errors import UserError
from dmm.files.claims import check_unclaimed
from dmm.files.outputs import held_bytes
from dmm.files.prompts import read_prompts
from dmm.files.runs import CHECKPOINTS, FIRST_STAGE, LOG, RECIPE, STYLE_RUNS, check_new
from dmm.files.sizes import told_bytes
from dmm.recipes.recipe import load_recipe
from dmm.training.ranks import is_main_process, told_once

if TYPE_CHECKING:
    from dmm.training.merge import Merged
    from dmm.training.outlook import Outlook


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path, nargs="?", help="what is merged, on what and how")
    parser.add_argument(
        "--new",
        metavar="FOLDER",
        type=Path,
        help="write a recipe for the models and LoRAs in FOLDER, as FOLDER/recipe.yaml or --output, and do no more",
    )
    add_run_arguments(parser, may_lack_output=True)


def add_run_arguments(parser: argparse.ArgumentParser, *, may_lack_output: bool = False) -> None:
    """Declare what every command that trains takes beside its recipe.

    Args:
        may_lack_output: the command does other things, too, and sees itself that there is an output.
    """
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=not may_lack_output, help="of the run and its result"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR, or begin one where there is none"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge in DIR")
    add_device(parser)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="over what the recipe says: training.steps=10, teachers.0.lora_scale=0.5; may be given several times",
    )


def run(args: argparse.Namespace) -> None:
    """Merge, and say what was written.

    Raises: see :func:`train`.
    """
    if args.new is not None:
        if args.recipe is not None or args.overrides or args.resume:
            raise UserError("--new writes a recipe, beside which there is no RECIPE.yaml, --set or --resume.")
        _write_recipe(args.new, args.output or args.new / RECIPE, overwrite=args.overwrite)
        return
    if args.recipe is None or args.output is None:
        missing = "RECIPE.yaml" if args.recipe is None else "--output DIR"
        raise UserError(f"{missing} is missing (dmm merge --help tells more).")
    train(args, args.overrides)


def _write_recipe(folder: Path, path: Path, *, overwrite: bool) -> None:
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    from dmm.planning.new_recipe import new_recipe

    recipe, left = new_recipe(folder, path, overwrite=overwrite)
    for one in left:
        print(f"left out: {one}")
    names = ", ".join(teacher.name for teacher in recipe.teachers)
    typed = shlex.quote(str(path))
    print(
        f"Wrote {path}: {names} on {recipe.base}.\n"
        f"  plan:  dmm plan {typed}\n"
        f"  merge: dmm merge {typed} --output merged"
    )


def train(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Merge by a recipe, and say what was written.

    Args:
        overrides: of the recipe's keys.
    Raises: UserError: see :func:`dmm.training.merge.merge`; KeyboardInterrupt: with a word on how to go on.
    """
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with what is there, --overwrite removes it: give one of them.")
    check_device(args.device)
    with told_once():
        recipe = load_recipe(args.recipe, overrides)
        if is_main_process():
            check_unclaimed(args.output)
        for stage in (recipe.data, recipe.finetune):
            if stage is not None and stage.synthesize is not None:
                read_prompts(stage.synthesize.prompts)
        if not args.resume:
            check_new(args.output, overwrite=args.overwrite)
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    import torch

    from dmm.training.merge import merge
    from dmm.training.trainer import Stopped

    # what was imported, a million objects, is no garbage: not to be looked through whenever a model is let go
    gc.collect()
    gc.freeze()
    try:
        merged = merge(recipe, args.output, resume=args.resume, overwrite=args.overwrite, device=args.device, tell=_say)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The device ran out of memory: lower training.micro_batch_size, or set training.gradient_checkpointing to "
            "true. --resume goes on from the last checkpoint, if there is one."
        ) from error
    except Stopped:
        if not is_main_process():
            sys.exit(130)
        raise
    except KeyboardInterrupt:
        started = any((folder / CHECKPOINTS).is_dir() for folder in (args.output, args.output / FIRST_STAGE))
        raise KeyboardInterrupt(
            "--resume goes on from the last checkpoint"
            if started
            else "nothing was written; what was encoded is found again by the next run"
        ) from None
    if is_main_process():
        print(_told(merged))


def _say(outlook: "Outlook") -> None:
    from dmm.planning.telling import outlook_lines

    print(outlook_lines(outlook), flush=True)  # before hours of work, into a file too


def _told(merged: "Merged") -> str:
    folder, styles = merged.folder, ", ".join(merged.styles)
    what = "ControlNet, with the controls" if merged.is_control else "diffusers pipeline, with the styles"
    if merged.was_finished:
        return f"{folder} is finished already: a stock {what} {styles}."
    place, style = shlex.quote(str(folder)), shlex.quote(merged.styles[-1])
    paint = f"{place} --style {style} PROMPT"
    if merged.is_control:
        paint = f"MODEL PROMPT --controlnet {place} --control {style} --control-image FILE"
    # styles that are adapters have been trained one after another, each with a log and checkpoints of its own
    logs = LOG if (folder / LOG).is_file() else f"{STYLE_RUNS}/*/{LOG}"
    lines = [
        f"Wrote {folder} in {merged.seconds:.0f} s: a stock {what} {styles}.",
        f"  paint:       dmm generate {paint}",
    ]
    if any(folder.glob(logs)):
        lines.append(f"  curves:      {folder}/{logs}; samples, if any, in {folder}/samples")
    for where in (CHECKPOINTS, f"{STYLE_RUNS}/*/{CHECKPOINTS}"):
        if kept := sum(held_bytes(found) for found in folder.glob(where)):
            what = f"{folder}/{where}, {told_bytes(kept)}"
            lines.append(f"  checkpoints: {what}; remove them once no --resume will need them")
    return "\n".join(lines)
