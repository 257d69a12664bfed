"""Take a style out of a merged model.

Its style prompt or adapter goes, so that nobody can ask for the style by name; the other styles paint exactly what they
painted. What the model has learnt of it stays in the weights that all styles share: it can still show through in mixes,
and who knew the prompt could put it back. To have it gone, merge again without its teacher. Where styles are adapters
on weights that were frozen, these have learnt nothing of it: the model is as if it had never been shown the teacher,
but for pictures by that teacher on which others may have been trained, and for room that it took of their bytes.

Examples:
  dmm remove merged ink --output merged-without-ink
"""

import argparse
from pathlib import Path

from dmm.cli.opening import check_there
from dmm.files.outputs import check_new_folder
from dmm.maths.mixes import check_name
from dmm.models.style_names import read_style_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("merged", metavar="MERGED", help="a merged model: a folder or a hub id")
    parser.add_argument("name", metavar="NAME", help="of the style")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="of the model without it")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in DIR")


def run(args: argparse.Namespace) -> None:
    """Write the model without the style.

    Raises: UserError: see :func:`dmm.pipeline.removal.remove_style`.
    """
    check_there(args.merged)
    names = read_style_names(args.merged)
    if names:
        check_name(names, args.name)
    check_new_folder(args.output, overwrite=args.overwrite)
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    from dmm.pipeline.removal import remove_style

    left = remove_style(args.merged, args.name, args.output, overwrite=args.overwrite)
    print(
        f"Wrote {args.output}: the styles {', '.join(left)}. '{args.name}' cannot be asked for any more; what the "
        "shared weights have learnt of it, if they were trained, stays in them."
    )
