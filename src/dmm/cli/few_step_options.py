"""Steps, guidance and sampler where nobody says them: as a few-step model or LoRA says, or the usual ones."""

import argparse
import copy
import sys
from pathlib import Path

from dmm.files.few_steps import STEPS, FewSteps, few_steps_of_header, few_steps_of_scheduler, read_few_steps
from dmm.pipeline.samplers import DEFAULT_SAMPLER

DEFAULT_STEPS = 25
DEFAULT_GUIDANCE = 7.0


def assumed(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with what can be told without opening anything, to be checked early.

    Raises: UserError: what a folder says of itself cannot be read.
    """
    filled = copy.copy(args)
    folder = Path(args.model).expanduser()
    _fill(filled, read_few_steps(folder) if folder.is_dir() and not args.from_checkpoint else None)
    return filled


def settle(args: argparse.Namespace, model: Path | None) -> None:
    """Fill in what the user has not said, and say so where that is a few-step model's choice.

    Args:
        model: where its files are; None of one that is under way.
    Raises: UserError: what a folder or a LoRA says of itself cannot be read.
    """
    from dmm.formats.lora import lora_file
    from dmm.formats.tensors import read_header

    few_steps, whose = (None if model is None else _of_model(model, args)), args.model
    for path, _ in args.loras:
        file = lora_file(path)
        header = read_header(file, allow_pickle=args.allow_pickle)
        of_lora = few_steps_of_header(header.metadata, str(file))
        if of_lora is not None:
            few_steps, whose = of_lora, str(path)
    chosen = _fill(args, few_steps)
    if few_steps is not None and chosen:
        how = f" ({few_steps.method})" if few_steps.method else ""
        print(f"dmm: note: {whose} paints in few steps{how}: {', '.join(chosen)}", file=sys.stderr)


def _of_model(model: Path, args: argparse.Namespace) -> FewSteps | None:
    from dmm.formats.configs import carried_config
    from dmm.formats.tensors import read_header

    if model.is_dir():
        return read_few_steps(model)
    header = read_header(model, allow_pickle=args.allow_pickle)
    return few_steps_of_scheduler(carried_config(model, header, "scheduler/scheduler_config.json") or {})


def _fill(args: argparse.Namespace, few_steps: FewSteps | None) -> list[str]:
    """Fill in what is not said; returns what that is, for people."""
    chosen = []
    if args.steps is None:
        args.steps = DEFAULT_STEPS if few_steps is None else STEPS
        chosen.append(f"{args.steps} steps")
    if args.sampler is None:
        args.sampler = DEFAULT_SAMPLER if few_steps is None else few_steps.sampler
        chosen.append(f"sampler {args.sampler}")
    if args.guidance is None:
        args.guidance = DEFAULT_GUIDANCE if few_steps is None else few_steps.guidance_scale
        told = "" if few_steps is None or args.guidance == 1 else ", which it is told"
        chosen.append(f"guidance {args.guidance:g}{told}")
    return chosen
