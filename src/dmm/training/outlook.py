"""What a merge is going to do, told before it begins."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from dmm.data import CaptionedImages, Synthesis
from dmm.files.outputs import existing_parent
from dmm.files.runs import CHECKPOINTS, FIRST_STAGE, SAMPLES, checkpoints, step_of
from dmm.maths.sharing import share_batch
from dmm.recipes.recipe import Recipe
from dmm.training.costs import checkpoint_bytes, disk_bytes, student_bytes, teacher_bytes
from dmm.training.preflight import Plan, shares_of


def describe(
    recipe: Recipe,
    plan: Plan,
    source: CaptionedImages | Synthesis,
    folder: Path,
    *,
    device: torch.device,
    num_processes: int,
) -> str:
    """A merge in a few lines: who, on what, how long, what it takes, and from where it goes on.

    Args:
        source: of the data.
        folder: of the run; its newest checkpoint is taken at its name.
    """
    training, averaged = recipe.training, recipe.training.ema_decay is not None
    sizes, half = plan.sizes, training.precision != "fp32"
    stage = "First stage of two: " if folder.name == FIRST_STAGE else ""
    stage = "Second stage: " if (folder / FIRST_STAGE).is_dir() else stage
    processes = "" if num_processes == 1 else f" in {num_processes} processes, each"
    num_served = len(share_batch(training.batch_size, shares_of(recipe), num_processes, 0))
    place, interval = existing_parent(folder), recipe.sample_interval
    lines = {
        "training": f"{count(training.steps, 'step')} of {count(training.batch_size, 'sample')}, "
        f"{_samples(recipe, plan.styles)}; learning rate {training.learning_rate:g}",
        "data": _data(source, plan.size),
        "samples": f"{every(interval)} in {folder / SAMPLES}" if interval else "none",
        "checkpoints": f"{every(recipe.checkpoint.every)} and at the end, of "
        f"{gigabytes(checkpoint_bytes(sizes, averaged=averaged))} each; {kept(recipe.checkpoint.keep)}",
        "memory": f"{gigabytes(student_bytes(sizes, averaged=averaged))} for what is trained, "
        f"{gigabytes(teacher_bytes(sizes, num_teachers=num_served, half=half))} for {count(num_served, 'teacher')}, "
        f"and what {min(training.micro_batch_size, training.batch_size)} samples at a time take",
        "disk": f"{gigabytes(disk_bytes(sizes, keep=recipe.checkpoint.keep, averaged=averaged))} of "
        f"{gigabytes(shutil.disk_usage(place).free)} that are free at {place}",
    }
    saved = checkpoints(folder / CHECKPOINTS)
    if saved:
        lines["goes on"] = f"from step {step_of(saved[-1]):,} of {training.steps:,}"
    styles = f"{count(len(plan.styles), 'style')} ({', '.join(plan.styles)})"
    head = f"{stage}{styles} merged{processes} on {told_device(device)}, in {training.precision}."
    return "\n".join([head, *(f"  {f'{name}:':<13}{told}" for name, told in lines.items())])


def _samples(recipe: Recipe, styles: Sequence[str]) -> str:
    """All of a run, and of each style."""
    total = recipe.training.steps * recipe.training.batch_size
    new = shares_of(recipe)[: len(recipe.teachers)]
    earlier = [recipe.earlier.regularization / (len(styles) - len(new))] if recipe.earlier else []
    shares = new + earlier
    least, most = (round(total * share) for share in (min(shares), max(shares)))
    each = f"{most:,}" if most == least else f"{least:,} to {most:,}"
    return f"{total:,} in all, {each} of each style"


def _data(source: CaptionedImages | Synthesis, size: int) -> str:
    if isinstance(source, Synthesis):
        prompts = count(len(source.prompts), "prompt")
        return f"{source.count:,} pictures of {prompts}, painted in {source.steps} steps, {size} x {size} pixels"
    return f"{len(source.captions):,} pictures with captions, brought to {size} x {size} pixels"


def told_device(device: torch.device) -> str:
    """A device, for people."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{device} ({torch.cuda.get_device_name(device)}, {gigabytes(memory)})"
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


def gigabytes(num_bytes: int) -> str:
    """A size, for people."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
