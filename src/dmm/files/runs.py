"""The folder of a merge, or of a few-step distillation: the names in it, and how far one that is under way has come."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.files.outputs import check_folder
from dmm.files.yaml import read_yaml

RECIPE = "recipe.yaml"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
FIRST_STAGE = "first-stage"
CALIBRATION = "calibration"
STYLE_RUNS = "training"
"""Where styles are adapters: a folder for each, with a log and checkpoints of its own."""
UNTRAINED = "untrained"
ACCELERATION = "acceleration"
"""Where a few-step distillation runs, in the folder of its result."""
FAST = "fast.safetensors"
"""What that comes to where it trains a LoRA."""
INDEX = "model_index.json"
"""Of the result: it comes last, and without it nothing takes the folder for a pipeline."""
NET_INDEX = "config.json"
"""The same of a merged ControlNet, which is no pipeline."""


@dataclass(frozen=True)
class Run:
    """A merge, or a few-step distillation, that is on disk.

    Attributes:
        folder: of the stage that it is in.
        step: of its newest checkpoint; 0 where it has none.
        num_steps: of the stage, or of the style.
        is_first_stage: whether a second one comes.
        is_finished: whether its result is there.
        is_acceleration: whether it is a few-step distillation.
        style: that is being trained, by its folder's name, where each is trained by itself.
        is_calibrated: whether its styles are adapters that are a merge already.
    """

    folder: Path
    step: int
    num_steps: int
    is_first_stage: bool
    is_finished: bool
    is_acceleration: bool
    style: str | None = None
    is_calibrated: bool = False

    @property
    def title(self) -> str:
        """What it is, for people."""
        return "a few-step distillation" if self.is_acceleration else "a merge"

    @property
    def can_paint(self) -> bool:
        """Whether there is something to paint with."""
        return bool(self.step) or self.is_calibrated

    def told(self) -> str:
        """How far it has come, to end a sentence."""
        stage = " of its first stage" if self.is_first_stage else ""
        if not self.step:
            return f"{'its styles are calibrated, and ' if self.is_calibrated else ''}no checkpoint{stage} is saved yet"
        of_style = "" if self.style is None else f" of the style '{self.style}'"
        return f"step {self.step} of {self.num_steps}{of_style}{stage} is saved"


def find_run(folder: Path) -> Run | None:
    """The merge or few-step distillation that a folder holds, finished or not; None where it holds none.

    Raises: UserError: its recipe cannot be read.
    """
    stages = [place for place in (folder, folder / FIRST_STAGE, folder / ACCELERATION) if _is_run(place)]
    if not stages:
        return None
    place = stages[0]
    recipe: Any = read_yaml(place / RECIPE)[0]
    training = recipe.get("training")
    num_steps = training.get("steps") if isinstance(training, dict) else None
    num_steps = num_steps if isinstance(num_steps, int) else 0
    found = checkpoints(place / CHECKPOINTS)
    style = _style_under_way(place)
    if style is not None:
        found = checkpoints(place / STYLE_RUNS / style / CHECKPOINTS)
        num_steps = max(1, round(num_steps * _weight(recipe, style)))
    return Run(
        place,
        step=(step_of(found[-1]) or 0) if found else 0,
        num_steps=num_steps,
        is_first_stage=place == folder / FIRST_STAGE,
        is_finished=has_result(folder) or (folder / FAST).is_file(),
        is_acceleration=place == folder / ACCELERATION,
        style=style,
        is_calibrated=(place / UNTRAINED / INDEX).is_file(),
    )


def has_result(folder: Path) -> bool:
    """Whether the result of a merge is there."""
    return (folder / INDEX).is_file() or (folder / NET_INDEX).is_file()


def holds_net(folder: Path) -> bool:
    """Whether a folder holds a ControlNet, which is no pipeline."""
    return (folder / NET_INDEX).is_file() and not (folder / INDEX).is_file()


def check_finished(folder: Path) -> None:
    """Refuse the folder of a run that has not ended, or of one that has come to a LoRA, where a model is expected.

    Raises: UserError: with how far it is, and how to go on.
    """
    run = None if has_result(folder) else find_run(folder)
    if run is None:
        return
    if run.is_acceleration and run.is_finished:
        raise UserError(f"{folder} holds a LoRA, no model. Put {folder / FAST} on the model that it was made for.")
    if run.is_acceleration:
        raise UserError(
            f"{folder} is a few-step distillation that has not ended: {run.told()}. Go on with the command that it "
            "began with, and --resume."
        )
    go_on = f"`dmm merge {shlex.quote(str(folder / RECIPE))} --output {shlex.quote(str(folder))} --resume`"
    if run.is_first_stage:  # whose own recipe knows of no second one
        go_on = f"the recipe that it began with, --output {shlex.quote(str(folder))} and --resume"
    paint = "; `dmm generate --from-checkpoint` paints with what is saved" if run.can_paint else ""
    raise UserError(f"{folder} is a merge that has not ended: {run.told()}. Go on with {go_on}{paint}.")


def check_new(folder: Path, *, overwrite: bool) -> None:
    """Refuse the folder of an earlier merge, or of anything else, for a new one.

    Raises: UserError: with what is there, and how to go on with it or to replace it.
    """
    run = None if overwrite else find_run(folder)
    if run is not None and run.is_finished:
        raise UserError(f"'{folder}' holds {run.title}. Name another output, or add --overwrite to replace it.")
    if run is not None:
        raise UserError(
            f"'{folder}' holds {run.title} that has not ended: {run.told()}. --resume goes on with it, --overwrite "
            "begins anew; or name another output."
        )
    check_folder(folder, overwrite=overwrite)


def checkpoints(root: Path) -> list[Path]:
    """All checkpoints that were put in place in a folder, the oldest first; some may be damaged."""
    orders = {folder: order for folder in root.glob("step-*") if (order := _order(folder))}
    return sorted(orders, key=orders.__getitem__)


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's name tells; None for what is no checkpoint."""
    order = _order(checkpoint)
    return order[0] if order else None


def _order(folder: Path) -> tuple[int, int] | None:
    """A checkpoint's step, and which save of that step it is."""
    match = re.fullmatch(r"step-(\d{8,})(?:\.(\d+))?", folder.name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def _style_under_way(folder: Path) -> str | None:
    """Of the styles that have checkpoints of their own, the one that was trained last, by its folder's name."""
    roots = [root for root in folder.glob(f"{STYLE_RUNS}/*/{CHECKPOINTS}") if checkpoints(root)]
    return max(roots, key=lambda root: root.stat().st_mtime).parent.name if roots else None


def _weight(recipe: Any, style: str) -> float:
    for teacher in recipe.get("teachers") or ():
        if (
            isinstance(teacher, dict)
            and teacher.get("name") == style
            and isinstance(teacher.get("weight"), int | float)
        ):
            return float(teacher["weight"])
    return 1.0


def _is_run(folder: Path) -> bool:
    # a recipe by itself may be anyone's
    return (folder / RECIPE).is_file() and (folder / CHECKPOINTS).is_dir()
