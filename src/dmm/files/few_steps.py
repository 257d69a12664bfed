"""What a few-step model, or LoRA, was distilled with, and so how it is painted with; nothing heavy at import."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.files.json import parse_json, read_json

FILE = "few_steps.json"
"""Of a model's folder."""
KEY = "dmm.few_steps"
"""Of a LoRA's header, whose value is what the file of a folder holds."""
STEPS = 4
"""That such a model is painted with where nothing else is said."""
SAMPLERS = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}
"""Schedulers that a folder names only for such a model, and what people call them."""


@dataclass(frozen=True)
class FewSteps:
    """How a model comes to paint in a few steps."""

    method: str
    """``splam`` or ``lcm``; empty where it is not known."""
    guidance: tuple[float, float]
    """That is in its weights; where the two differ, what it is told is between them."""
    skip: int
    """Timesteps between two points of the path that it was led along; 0 where that is not known."""
    rank: int = 0
    """Of a LoRA; 0 where all weights were trained."""
    sampler: str = "LCM"

    @property
    def guidance_scale(self) -> float:
        """To paint with: 1, which is none, where guidance is in the weights; what it is told, otherwise."""
        least, most = self.guidance
        return 1.0 if least == most else (least + most) / 2

    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def read_few_steps(folder: Path) -> FewSteps | None:
    """How a model's folder says that it paints in a few steps; None of any other model.

    Raises: UserError: what it says cannot be read.
    """
    if (folder / FILE).is_file():
        return _parsed(read_json(folder / FILE), str(folder / FILE))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return few_steps_of_scheduler(read_json(scheduler)) if scheduler.is_file() else None


def few_steps_of_scheduler(config: Mapping[str, Any]) -> FewSteps | None:
    """What a model's scheduler config says; None of any other model."""
    name = config.get("_class_name")
    return FewSteps("", (1.0, 1.0), 0, sampler=SAMPLERS[name]) if name in SAMPLERS else None


def few_steps_of_header(metadata: Mapping[str, str], where: str) -> FewSteps | None:
    """What a LoRA's header says; None of any other LoRA.

    Args:
        where: its file.
    Raises: UserError: that cannot be read.
    """
    return _parsed(parse_json(metadata[KEY], where), where) if KEY in metadata else None


def _parsed(value: Any, where: str) -> FewSteps:
    try:
        guidance = tuple(map(float, value["guidance"]))
        found = FewSteps(
            str(value["method"]), (guidance[0], guidance[1]), int(value["skip"]), int(value["rank"]), value["sampler"]
        )
        known = found.sampler in SAMPLERS.values() and 1 <= guidance[0] <= guidance[1]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{where} does not tell what a few-step model was distilled with. Copy it again.") from error
    if not known:
        raise UserError(f"{where} tells of a sampler or a guidance that is none. Copy it again.")
    return found
