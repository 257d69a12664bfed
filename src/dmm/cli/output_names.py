"""Where pictures go: what ``--output`` names, or a free name made of what is painted."""

import argparse
import itertools
import os
import re
from pathlib import Path

from dmm.cli.arguments import write_seeds
from dmm.cli.style_options import asks_for_styles, write_style
from dmm.errors import UserError


def name_output(args: argparse.Namespace, prompts: list[str], seeds: list[int]) -> tuple[Path, bool]:
    """Where to write, and whether it is a folder.

    Raises: UserError: it names a file that is no PNG.
    """
    named = args.output
    if named is None:
        return _free_name(args, prompts, seeds), False
    path = Path(named).expanduser()
    if named.endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        return path, True
    if path.suffix.lower() != ".png":
        raise UserError(
            f"--output {named}: pictures are written as PNG. Name a .png file; or a folder, with a slash at the end."
        )
    return path, False


def _free_name(args: argparse.Namespace, prompts: list[str], seeds: list[int]) -> Path:
    words = _slug(prompts[0])[:40].strip("-") or "picture"
    more = f"-and-{len(prompts) - 1}-more" if len(prompts) > 1 else ""
    numbers = write_seeds(seeds)
    if len(numbers) > 20:
        numbers = f"{seeds[0]}-and-{len(seeds) - 1}-more"
    stem = f"{words}{more}-seed{numbers}{_styles_in_name(args)}"
    names = (f"{stem}{f'-{i}' if i else ''}.png" for i in itertools.count())
    return next(path for path in map(Path, names) if not path.exists())


def _styles_in_name(args: argparse.Namespace) -> str:
    if args.style and len(args.style) == 1:
        return f"-{_slug(write_style(args.style[0]))[:40]}"
    if args.strip:
        return f"-{_slug('-to-'.join(args.strip))[:40]}"
    return "-pairs" if args.pairs else "-styles" if asks_for_styles(args) else ""


def _slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")
