"""Put the reports of several evaluations side by side: merges, ablations, seeds.

DIR gets comparison.md, a table, and comparison.png, the same with error bars. A report is the folder that dmm evaluate
wrote, by default called as that folder is. Several under one name are one thing with other seeds: they become their
mean, and its standard error.

Examples:
  dmm compare report-a report-b --output comparison
  dmm compare plain=report-1 plain=report-2 features=report-3 features=report-4 --output comparison
"""

import argparse
from pathlib import Path

from dmm.errors import UserError
from dmm.files.outputs import check_new_folder, new_folder

TABLE, PLOT = "comparison.md", "comparison.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("reports", metavar="[NAME=]REPORT", nargs="+", type=_report, help="what dmm evaluate wrote")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="of the table and the plot")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in DIR")


def run(args: argparse.Namespace) -> None:
    """Compare, write, and print the table.

    Raises: UserError: a report is none, two cannot be compared, or the output cannot be written.
    """
    if len(args.reports) < 2:
        raise UserError("Name two reports or more to compare.")
    check_new_folder(args.output, overwrite=args.overwrite)
    from dmm.report.compare import compare_reports, draw_comparison, write_table
    from dmm.report.files import read_report

    compared = compare_reports([(name, read_report(path)) for name, path in args.reports])
    table = write_table(compared)
    with new_folder(args.output, overwrite=args.overwrite) as building:
        (building / TABLE).write_text(table, encoding="utf-8")
        draw_comparison(compared, building / PLOT)
    print(f"{table}\nWrote {args.output / TABLE} and {args.output / PLOT}.")


def _report(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if equals and not (name and path):
        raise argparse.ArgumentTypeError(f"'{text}' is no report; write PATH, or NAME=PATH")
    return (name, Path(path)) if equals else (Path(text).resolve().name, Path(text))
