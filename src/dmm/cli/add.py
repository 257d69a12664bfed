"""Add styles to a merged model, and keep those that it has.

A recipe says what is added, as that of dmm merge does; the base is MERGED, unless a LoRA needs the model that it
was made for:

  base: models/base                     # what LoRAs are put on; may be left out if there is none
  teachers:
    - {name: pastel, model: models/pastel}
    - {name: line, lora: line.safetensors}
  data:
    synthesize: {prompts: prompts.txt, count: 1500}   # MERGED paints, too, in each of its styles
  earlier: {regularization: 0.5}        # the share of every batch that keeps the earlier styles
  training: {steps: 2500}

What it does not say of size, losses, precision, batches, the steps and guidance of what is painted is taken from
MERGED's own recipe, where that is there; so are the learning rates, at half of what they were.

The earlier styles' teachers are not needed: MERGED itself, frozen, is the teacher of its own styles, one drawn at
random for each sample. With a regularization of 0 they are forgotten. MERGED is not changed; DIR gets a model with all
styles, to which more can be added again.

Examples:
  dmm add merged more.yaml --output merged-more
  dmm add merged more.yaml --output merged-more --resume
  dmm add merged more.yaml --output merged-more --set earlier.regularization=0.7
"""

import argparse
import json
from pathlib import Path

from dmm.cli.merge import add_run_arguments, train
from dmm.files.runs import FIRST_STAGE, RECIPE
from dmm.files.yaml import read_yaml
from dmm.recipes.further import taken_from
from dmm.recipes.recipe import load_recipe
from dmm.training.ranks import is_main_process, told_once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("merged", metavar="MERGED", help="a merged model: a folder or a hub id")
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path, help="what is added, on what data and how")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Merge further, and say what was written.

    Raises: see :func:`dmm.cli.merge.train`.
    """
    # paths in a recipe are relative to it, those on a command line to where it is typed
    merged = Path(args.merged).resolve() if Path(args.merged).exists() else args.merged
    taken = _taken(args)
    # first, so that what is set by the user is set over it
    train(args, [*taken, f"earlier.model={json.dumps(str(merged))}", *args.overrides])


def _taken(args: argparse.Namespace) -> list[str]:
    """What the new recipe does not say and the earlier merge's does, as overrides; told on the main process.

    Raises: UserError: one of the two recipes cannot be read.
    """
    merged = Path(args.merged).expanduser()
    # of two stages the first one is the merge that took the student there
    found = [path for path in (merged / FIRST_STAGE / RECIPE, merged / RECIPE) if path.is_file()]
    with told_once():
        if not found:
            return []
        given, _ = read_yaml(args.recipe)
        earlier = load_recipe(found[0], may_be_gone=True)
        overridden = [override.partition("=")[0] for override in args.overrides]
        taken = taken_from(earlier, given, overridden)
    told = [f"{key}={json.dumps(value)}" for key, value in taken.items()]
    if told and is_main_process():
        rates = "" if earlier.earlier else " (rates: half of the merge's)"
        print(f"Taken from {found[0]}, since {args.recipe} does not say{rates}: {', '.join(told)}.", flush=True)
    return told
