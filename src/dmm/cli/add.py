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
  training: {steps: 2500, batch_size: 32, micro_batch_size: 8}

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
    train(args, [f"earlier.model={json.dumps(str(merged))}", *args.overrides])
