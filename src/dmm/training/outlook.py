"""What a run is going to do, once all of it was checked, for whoever tells of it; and words to tell it in."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dmm.data import CaptionedImages, Synthesis
from dmm.files.sizes import told_bytes
from dmm.recipes.recipe import Recipe
from dmm.training.merge_plan import Plan


@dataclass(frozen=True)
class Outlook:
    """One stage of a merge, before it begins.

    Attributes:
        source: of the data.
        folder: of the run; its newest checkpoint is taken at its name.
        device: of each process.
    """

    recipe: Recipe
    plan: Plan
    source: CaptionedImages | Synthesis
    folder: Path
    device: torch.device
    num_processes: int


def told_device(device: torch.device) -> str:
    """A device, for people."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{device} ({torch.cuda.get_device_name(device)}, {told_bytes(memory)})"
    return f"the CPU with {count(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device)


def every(steps: int) -> str:
    """How often, for people."""
    return "every step" if steps == 1 else f"every {steps:,} steps"


def kept(keep: int) -> str:
    """How many checkpoints stay, for people."""
    return "the newest stays" if keep == 1 else f"the newest {keep} stay"


def count(number: int, noun: str) -> str:
    """A number of things, for people."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
