"""Tell what a merge will take, before it begins: memory, disk, samples, arithmetic and time.

Only configs and headers are read; the models are run without their numbers, which takes seconds and next to no memory.
It says which memory a process needs in each phase, whether that fits some cards, what to change where it does not, and
how long the merge takes there. A figure that was measured is told apart from those that are scaled.

Examples:
  dmm plan recipe.yaml
  dmm plan recipe.yaml --memory 24GB                     # what to change to fit
  dmm plan recipe.yaml --set styles.rank=16 --json
  dmm plan recipe.yaml --processes 8 --device cuda
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.recipes.recipe import Recipe, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", type=Path, help="of a merge")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="where it will run (default: as dmm merge here; tables are of GPUs)"
    )
    parser.add_argument("--memory", metavar="SIZE", type=_memory, help="of the GPU, such as 24GB, that it shall fit")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="that will share the work (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes, samples, FLOPs, hours")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="as of dmm merge"
    )


def run(args: argparse.Namespace) -> None:
    """Plan, and print.

    Raises: UserError: what dmm merge would refuse.
    """
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}; at least 1 was expected.")
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.kind == "controlnet":
        raise UserError("A plan is of models; what a merge of ControlNets takes, dmm merge tells before it begins.")
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    import torch

    from dmm.planning.estimate import as_json
    from dmm.planning.look import Looked, look
    from dmm.planning.telling import advice_line, plan_lines

    on_gpu = (args.device or ("cuda" if args.memory or torch.cuda.is_available() else "cpu")) == "cuda"
    many = args.processes

    def planned(stage: Recipe, looked: Looked) -> Any:
        found = looked.estimate(stage, on_gpu=on_gpu, num_bytes=args.memory, num_processes=many)
        if args.json:
            return as_json(found, num_processes=many)
        lines = plan_lines(stage, looked, found, on_gpu=on_gpu, num_processes=many)
        return f"{lines}\n{advice_line(stage, looked, args.memory, many)}" if args.memory else lines

    looked = look(recipe, device=torch.device("cpu"), num_processes=many)
    first = planned(recipe, looked)
    second = looked.second_stage(recipe)
    then = planned(*second) if second else None
    if args.json:
        print(json.dumps(first | ({"finetune": then} if then else {}), indent=1))
    else:
        print(f"First stage: {first}\n\nSecond stage: {then}" if then else first)


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no memory; write it as 24GB")
    return round(float(match[1]) * 1e9)
