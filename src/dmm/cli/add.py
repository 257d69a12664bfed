"""Add styles to a merged model, and keep those that it has.

A recipe says what is added, as that of dmm merge does; the base is MERGED, unless a LoRA needs the model that it
was made for:

  base: models/base                     # what LoRAs are put on; may be left out if there is none
  teachers:
    - {name: pastel, model: models/pastel}
    - {name: line, lora: line.safetensors}
  data:
    synthesize: {prompts: prompts.txt, count: 1500}
  training: {steps: 1000}

What it does not say of size, precision, the steps and guidance of what is painted is taken from MERGED's own recipe,
where that is there; so are losses, batches and rates, where both recipes' styles are adapters, or prompts.

New styles are adapters, unless the recipe says styles: {rank: 0}; they are trained alone, and every earlier style
keeps every bit. With a rank of 0, to a model of style prompts, all weights are trained further: MERGED itself,
frozen, is then the teacher of its own styles, one drawn at random for each sample, in the share that
earlier.regularization says; at 0 they are forgotten. MERGED is not changed; DIR gets a model with all styles, to
which more can be added again.

Examples:
  dmm add merged more.yaml --output merged-more
  dmm add merged more.yaml --output merged-more --resume
  dmm add merged more.yaml --output merged-more --set styles.rank=0 --set earlier.regularization=0.7
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from dmm.cli.merge import add_run_arguments, train
from dmm.cli.opening import check_there
from dmm.files.runs import FIRST_STAGE, RECIPE
from dmm.files.yaml import read_yaml
from dmm.models.style_names import check_addition, read_style_names
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
    overrides = [f"earlier.model={json.dumps(str(merged))}", *args.overrides]
    with told_once():
        _check(args, overrides)
    # first, so that what is set by the user is set over it
    train(args, [*_taken(args, overrides), *overrides])


def _check(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Refuse what can be known of the merged model without its weights.

    Raises: UserError.
    """
    check_there(args.merged)
    names = read_style_names(args.merged)
    if names is not None:
        check_addition(args.merged, names, [teacher.name for teacher in load_recipe(args.recipe, overrides).teachers])


def _taken(args: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """What the new recipe does not say and the earlier merge's does, as overrides; told on the main process.

    Raises: UserError: one of the two recipes cannot be read.
    """
    merged = Path(args.merged).expanduser()
    # of two stages the first one is the merge that took the student there
    found = [path for path in (merged / FIRST_STAGE / RECIPE, merged / RECIPE) if path.is_file()]
    with told_once():
        if not found:
            return []
        has_adapters = load_recipe(args.recipe, overrides).styles.has_adapters
        given, _ = read_yaml(args.recipe)
        earlier = load_recipe(found[0], may_be_gone=True)
        overridden = [override.partition("=")[0] for override in args.overrides]
        taken = taken_from(earlier, given, overridden, has_adapters=has_adapters)
    told = [f"{key}={json.dumps(value)}" for key, value in taken.items()]
    if told and is_main_process():
        rates = "" if earlier.earlier or has_adapters else " (rates: half of the merge's)"
        print(f"Taken from {found[0]}, since {args.recipe} does not say{rates}: {', '.join(told)}.", flush=True)
    return told
