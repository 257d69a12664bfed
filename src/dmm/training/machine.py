"""Whether this machine can do what a recipe asks."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dmm.errors import UserError
from dmm.files.outputs import check_disk, held_bytes
from dmm.maths.sharing import share_batch
from dmm.recipes.recipe import Recipe


def check_machine(recipe: Recipe, num_processes: int, device: torch.device) -> None:
    """Check that this machine can do what a recipe asks.

    Raises: UserError: it does not compute in that precision, a tracker is not installed, or batches cannot be shared.
    """
    check_precision(recipe.training.precision, device)
    check_trackers(recipe.logging.trackers)
    _check_batch(recipe, num_processes)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that a device does not train in.

    Raises: UserError.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("training.precision is fp16, which a CPU does not train in; set it to bf16 or fp32.")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"training.precision is bf16, which {torch.cuda.get_device_name(device)} does not compute; set it to fp16 "
            "or fp32."
        )


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises: UserError.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    assert all(name in LOGGER_TYPE_TO_CLASS for name in trackers)  # the recipe knows accelerate's names
    for name in trackers:
        if name not in [str(available) for available in get_available_trackers()]:
            raise UserError(
                f"logging.trackers names {name}, which is not installed; install its package or leave it out."
            )


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse a disk that what a run writes does not fit on; checkpoints that are there already count as written.

    Raises: UserError.
    """
    missing = num_bytes - held_bytes(folder)
    check_disk(folder, missing, "the checkpoints and the result", "lower checkpoint.keep, or name another output")


def shares_of(recipe: Recipe) -> list[float]:
    """Each teacher's share of a batch; the last is the earlier student's, where there is one to be kept."""
    kept = recipe.regularization
    whole = sum(teacher.weight for teacher in recipe.teachers)
    shares = [(1 - kept) * teacher.weight / whole for teacher in recipe.teachers]
    return [*shares, kept] if kept else shares


def _check_batch(recipe: Recipe, num_processes: int) -> None:
    try:
        for process in range(num_processes):
            # of one style, where these are trained by themselves
            shares = shares_of(recipe) if recipe.styles.trained == "all" else [1.0]
            share_batch(recipe.training.batch_size, shares, num_processes, process)
    except ValueError as error:
        is_kept = recipe.regularization
        last = f" (teacher {len(recipe.teachers)} is the earlier merge, of earlier.regularization)" if is_kept else ""
        raise UserError(f"training.batch_size: {error}. Raise it, or that teacher's weight{last}.") from error
