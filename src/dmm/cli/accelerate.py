"""Distil a merged model, or any stock one, into one that paints in four steps, in all its styles.

MERGED itself, frozen, is the teacher: guided, in each of its styles. A recipe says how; the smallest one:

  data:
    synthesize: {prompts: prompts.txt, count: 1500}   # MERGED paints them in each of its styles; or {images: folder}
  guidance: 7                  # that is put into the weights: painting then needs none
  training: {steps: 6000, batch_size: 400, micro_batch_size: 8}

Of methods there are two: lcm, by default, and splam. With rank: 64 a LoRA is trained in place of the weights: it works
in every style, those that are added later too, and with other tools' LCM samplers. docs/accelerate.md tells of every
key. All of it is checked before anything large is loaded.

DIR gets the run (acceleration/) and at the end the result: a stock pipeline folder with MERGED's styles beside it, or
fast.safetensors, the LoRA. dmm generate paints with either as it should be: few steps, LCM's sampler, no guidance.

Examples:
  dmm accelerate merged fast.yaml --output merged-fast
  dmm generate merged-fast "a red cat" --style ink
  dmm accelerate merged fast.yaml --output lora --set rank=64
  dmm generate merged "a red cat" --style ink --lora lora/fast.safetensors
  dmm accelerate merged fast.yaml --output merged-fast --resume
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dmm.cli.hardware import check_device
from dmm.cli.merge import add_run_arguments
from dmm.errors import UserError
from dmm.files.claims import check_unclaimed
from dmm.files.prompts import read_prompts
from dmm.files.runs import ACCELERATION, CHECKPOINTS, check_new
from dmm.recipes.accelerating import load_few_step_recipe
from dmm.training.ranks import is_main_process, told_once

if TYPE_CHECKING:
    from dmm.training.acceleration import Accelerated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MERGED", help="a merged model or a stock one: a folder, a file or a hub id")
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path, help="how, and on what data")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Distil by a recipe, and say what was written.

    Raises: UserError: see :func:`dmm.training.acceleration.accelerate`; KeyboardInterrupt: with a word on how to go on.
    """
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with what is there, --overwrite removes it: give one of them.")
    check_device(args.device)
    # paths in a recipe are relative to it, those on a command line to where it is typed
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    with told_once():
        recipe = load_few_step_recipe(args.recipe, [f"model={json.dumps(model)}", *args.overrides])
        if is_main_process():
            check_unclaimed(args.output)
        if recipe.data.synthesize is not None:
            read_prompts(recipe.data.synthesize.prompts)
        if not args.resume:
            check_new(args.output, overwrite=args.overwrite)
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    import torch

    from dmm.training.acceleration import accelerate
    from dmm.training.trainer import Stopped

    try:
        done = accelerate(
            recipe, args.output, resume=args.resume, overwrite=args.overwrite, device=args.device, tell=_say
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The device ran out of memory: lower training.micro_batch_size, set training.gradient_checkpointing to "
            "true, or train a LoRA (rank). --resume goes on from the last checkpoint, if there is one."
        ) from error
    except Stopped:
        if not is_main_process():
            sys.exit(130)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "--resume goes on from the last checkpoint"
            if (args.output / ACCELERATION / CHECKPOINTS).is_dir()
            else "nothing was written; what was encoded is found again by the next run"
        ) from None
    if is_main_process():
        print(_told(done, args))


def _say(text: str) -> None:
    print(text, flush=True)  # before hours of work, into a file too


def _told(done: "Accelerated", args: argparse.Namespace) -> str:
    if done.was_finished:
        return f"{done.result} is finished already."
    style = f" --style {shlex.quote(done.styles[-1])}" if done.styles else ""
    is_lora = done.result != args.output
    result = shlex.quote(str(done.result))
    paint = f"{shlex.quote(str(args.model))}{style} --lora {result}" if is_lora else f"{result}{style}"
    return (
        f"Wrote {done.result} in {done.seconds:.0f} s: "
        + ("a LoRA for few steps.\n" if is_lora else "a pipeline that paints in few steps.\n")
        + f"  paint:       dmm generate {paint} PROMPT\n"
        f"  curve:       {args.output / ACCELERATION}/log.jsonl\n"
        f"  checkpoints: {args.output / ACCELERATION / CHECKPOINTS}; remove them once no --resume will need them"
    )
