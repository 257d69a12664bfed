"""``dmm evaluate`` of merged ControlNets: the residual error of every control."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.files.outputs import check_new_folder, new_folder
from dmm.files.prompts import read_prompts
from dmm.files.runs import RECIPE
from dmm.recipes.recipe import load_recipe

NUM_IMAGES = 256
REPORT = "report.json"


def run_controls(args: argparse.Namespace) -> None:
    """Evaluate, write ``report.json``, and say what was found.

    Raises: UserError: the recipe that they were merged by is missing, or knows no teacher that is still there.
    """
    start = time.monotonic()
    folder = Path(args.model).expanduser()
    check_new_folder(args.output, overwrite=args.overwrite)
    if not (folder / RECIPE).is_file():
        raise UserError(
            f"{folder} has no {RECIPE}, which says what each control is shown. Evaluate a merge's own folder."
        )
    recipe = load_recipe(folder / RECIPE, may_be_gone=True)
    teachers = {one.name: Path(one.model or "") for one in recipe.teachers}
    if args.teachers:
        teachers = {name: Path(path).expanduser() for name, (path, _) in args.teachers}
    for name, path in teachers.items():
        if not path.is_dir():
            raise UserError(f"teacher '{name}': there is no folder '{path}'; name it with --teacher {name}=PATH.")
    file = args.prompts or (recipe.data.synthesize.prompts if recipe.data.synthesize else None)
    prompts = None if file is None else read_prompts(file)

    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    from dmm.evaluation.controls import evaluate_controls
    from dmm.models.devices import find_device

    figures = evaluate_controls(
        folder,
        recipe,
        base=args.base or recipe.base,
        teachers=teachers,
        prompts=prompts,
        num_images=args.num_images or NUM_IMAGES,
        seed=args.seed,
        device=find_device(args.device),
    )
    with new_folder(args.output, overwrite=args.overwrite) as temporary:
        text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
        (temporary / REPORT).write_text(text, encoding="utf-8")
    print(_told(figures, args.output, time.monotonic() - start))


def _told(figures: dict[str, Any], folder: Path, seconds: float) -> str:
    found = figures["residual_error"]
    lines = [f"Wrote {folder}/{REPORT} in {seconds:.0f} s. Errors, 0: the teacher, 1: no control:"]
    for name, one in {**found["by_control"], "mean": found["mean"]}.items():
        lines.append(f"  {name}: residuals {one['residuals']:.4f}, the model's prediction {one['prediction']:.4f}")
    return "\n".join(lines)
