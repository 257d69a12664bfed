"""What the commands' arguments have in common: a parser whose errors are ours, and readers of values."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dmm.errors import UserError, nearest

MAX_SEED = 2**32 - 1  # torch's CPU generator reads no more than 32 bits of a seed
MAX_PICTURES = 100_000  # of one command: more is a slip of the keyboard


class Parser(argparse.ArgumentParser):
    """A command's parser: options and prompts in any order, no abbreviations, errors as :class:`UserError`.

    Args:
        command: its name.
        description: its help, printed as it stands.
    """

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=f"dmm {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise: UserError, argparse's message."""
        raise UserError(f"{message} ({self.prog} --help tells more).")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Read the arguments.

        Raises: UserError: there is an unknown option, a missing argument or a bad value.
        """
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            option = unknown[0].partition("=")[0]
            raise UserError(
                f"There is no option '{option}'{nearest(option, options)} ({self.prog} --help tells more)."
                if option.startswith("-")
                else f"'{option}' is one argument too many ({self.prog} --help tells more)."
            )
        return args


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """``--overwrite``, the same in every command that writes."""
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def add_device(parser: "argparse._ActionsContainer") -> None:
    """``--device``, the same in every command that computes."""
    parser.add_argument(
        "--device", metavar="NAME", type=_device, help="cuda, cuda:1, mps or cpu (default: the best there is)"
    )


def _device(text: str) -> str:
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", text):
        raise argparse.ArgumentTypeError(f"there is no device '{text}'; choose cuda, cuda:1, mps or cpu")
    return text


def read_seeds(text: str) -> list[int]:
    """Seeds as people write them: ``3``, ``0-7``, ``1,2,5`` or ``0-3,8``.

    Raises: argparse.ArgumentTypeError: it reads otherwise, or a seed is too large or named twice.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"'{text}' is no seed; write 3, 0-7, 1,2,5 or 0-3,8")
        if last > MAX_SEED:
            raise argparse.ArgumentTypeError(f"{last} is too large for a seed; the largest is {MAX_SEED}")
        if last - first >= MAX_PICTURES:
            raise argparse.ArgumentTypeError(f"{part} are {last - first + 1} seeds; {MAX_PICTURES} are the most")
        for seed in range(first, last + 1):
            if seed in seeds:
                raise argparse.ArgumentTypeError(f"seed {seed} is named twice in '{text}'")
            seeds[seed] = None
    return list(seeds)


def read_scaled_path(text: str) -> tuple[Path, float]:
    """A path and how strongly what is there shall act, as in ``ink.safetensors:0.8``; 1 where not told."""
    match = re.fullmatch(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+))", text)
    return (Path(match[1]).expanduser(), float(match[2])) if match else (Path(text).expanduser(), 1.0)


def write_seeds(seeds: Sequence[int]) -> str:
    """The shortest text that :func:`read_seeds` reads as ``seeds``."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
