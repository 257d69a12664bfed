"""Merge models without training, tell what is in a soup, and take shards out of it again.

A recipe says what is merged and how. The smallest one, a uniform soup:

  method: soup              # or weighted_sum, greedy, task_arithmetic, slerp, model_stock, ties, dare, dare_ties
  teachers:
    - {name: ink, model: models/ink}           # a pipeline folder, a single file or a hub id
    - {name: photo, model: photo.safetensors}

docs/soup.md tells of every method and key. Inputs are read in slices, so that memory stays small whatever their
number and size. A .safetensors output is one file of the original layout; any other is a diffusers folder.

A soup carries a ledger: its recipe, and the sha256 of all that went in. --remove makes the soup that never had
a shard, bit for bit; the models must still be there.

Examples:
  dmm soup recipe.yaml --output soup.safetensors
  dmm soup recipe.yaml --output soup --set method=ties --set base=models/base
  dmm soup soup.safetensors                                          # what is in it?
  dmm soup soup.safetensors --remove ink --output without-ink.safetensors
  dmm soup soup.safetensors --add clay=clay.safetensors --output more.safetensors
  dmm soup soup.safetensors --output again.safetensors               # from its ledger, sources checked
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dmm.cli.arguments import add_overwrite
from dmm.errors import UserError
from dmm.files.outputs import check_file, check_new_folder
from dmm.files.sizes import told_bytes

if TYPE_CHECKING:
    from dmm.soup.ledger import Ledger
    from dmm.soup.recipe import SoupRecipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", metavar="RECIPE.yaml|SOUP", type=Path, help="a recipe, or a soup that was made")
    parser.add_argument("--output", metavar="PATH", type=Path, help="a .safetensors file, or a folder")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="over what the recipe says: method=ties, weights.ink=0.3; may be given several times",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="by default one a core, or one for two where a method only reads and adds; the result is the same",
    )
    add_overwrite(parser)
    change = parser.add_argument_group("changing a soup")
    change.add_argument(
        "--add",
        metavar="NAME=MODEL[:W]",
        action="append",
        default=[],
        type=_addition,
        help="one shard more, of weight W (default: 1)",
    )
    change.add_argument("--remove", metavar="NAME", action="append", default=[], help="the soup without that shard")
    change.add_argument("--models", metavar="FOLDER", type=Path, help="where models are that were moved")


def run(args: argparse.Namespace) -> None:
    """Make a soup, or tell what is in one.

    Raises: UserError: see :func:`dmm.soup.cook.cook`; KeyboardInterrupt: with a word on what was left behind.
    """
    source, output = args.source.expanduser(), args.output and args.output.expanduser()
    is_recipe = source.suffix.lower() in (".yaml", ".yml")
    changes = bool(args.add or args.remove)
    if is_recipe and (changes or args.models):
        raise UserError("--add, --remove and --models change a soup; in a recipe, change the list of teachers.")
    if not is_recipe and args.overrides:
        raise UserError("--set changes a recipe; a soup is changed by --add and --remove.")
    if output is None and (is_recipe or changes):
        raise UserError("Name the --output: a .safetensors file, or a folder.")
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be at least 1, not {args.threads}.")
    if output is not None:
        (check_file if output.suffix == ".safetensors" else check_new_folder)(output, overwrite=args.overwrite)

    from dmm.soup.recipe import load_soup_recipe

    recipe = load_soup_recipe(source, args.overrides) if is_recipe else None
    if recipe is None and not source.exists():
        raise UserError(f"{source}: no such file or folder. Name a recipe (.yaml) or a soup.")
    ledger = None
    if recipe is None:
        from dmm.soup.ledger import read_ledger

        ledger = read_ledger(source, args.models)
        if output is None:
            print(_told(source, ledger))
            return
        recipe = _changed(ledger, args)
    _cook(recipe, output, ledger, args)


def _cook(recipe: "SoupRecipe", output: Path, ledger: "Ledger | None", args: argparse.Namespace) -> None:
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    from dmm.soup.cook import cook

    try:
        made = cook(recipe, output, ledger=ledger, overwrite=args.overwrite, threads=args.threads, bar=_bar)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    for note in made.notes:
        print(f"dmm: note: {note}", file=sys.stderr)
    what = "a LoRA" if recipe.kind == "lora" else f"{recipe.method} of {', '.join(sorted(recipe.names))}"
    print(f"Wrote {output}: {what}, {made.num_tensors} tensors, {told_bytes(made.num_bytes)}, in {made.seconds:.1f} s.")


def _changed(ledger: "Ledger", args: argparse.Namespace) -> "SoupRecipe":
    from dataclasses import replace

    from dmm.soup.ledger import with_more, without

    for name in args.remove:
        ledger = replace(ledger, recipe=without(ledger, name))
    for name, model, weight in args.add:
        ledger = replace(ledger, recipe=with_more(ledger, name, model, weight))
    return ledger.recipe


def _told(soup: Path, ledger: "Ledger") -> str:
    from dmm.soup.registry import METHODS

    recipe = ledger.recipe
    base = f" on {Path(recipe.base).name}" if recipe.base else ""
    what = f" ({METHODS[recipe.method].title})" if recipe.method in METHODS else ""
    kind = "LoRAs" if recipe.kind == "lora" and recipe.method in METHODS else "models"
    lines = [f"{soup}: {len(ledger.entries)} {kind} by the method {recipe.method}{what}{base}"]
    width = max(len(str(entry["name"])) for entry in ledger.entries)
    for entry in ledger.entries:
        trained = f"  trained on: {entry['trained_on']}" if "trained_on" in entry else ""
        digest = str(entry["sha256"])[:12]
        lines.append(f"  {entry['name']:<{width}}  {entry['weight']:<8.4g}  {digest}  {entry['source']}{trained}")
    return "\n".join(lines)


def _addition(text: str) -> tuple[str, str, float | None]:
    name, equals, model = text.partition("=")
    if not equals or not name or not model:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=MODEL or NAME=MODEL:WEIGHT")
    weighted = re.fullmatch(r"(.+):([-+]?[0-9.]+(?:[eE][-+]?\d+)?)", model)
    try:
        return (name, weighted[1], float(weighted[2])) if weighted else (name, model, None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': '{weighted and weighted[2]}' is no weight") from None


@contextmanager
def _bar(stage: str, total: int) -> Iterator[Callable[[int], object]]:
    with tqdm(total=total, desc=stage, unit="", unit_scale=True, leave=False, miniters=1, mininterval=0.2) as bar:
        yield bar.update
