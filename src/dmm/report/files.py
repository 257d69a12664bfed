"""A report's figures on disk."""

from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.files.json import parse_json
from dmm.files.text import read_text

REPORT = "report.json"

_KEYS = (
    *("styles", "num_images", "extractor", "fid_matrix", "fid_reference", "fidt", "fidt_reference"),
    *("fidt_gap_percent", "kid", "score_error", "pairwise"),
)


def read_report(path: Path) -> dict[str, Any]:
    """The figures of a report.

    Args:
        path: a report's folder, or its ``report.json``.
    Raises: UserError: there is none, or it is none.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        figures = parse_json(read_text(file), f"'{file}'")
    except UserError as error:
        raise UserError(f"'{path}' is no report: {error} Name a folder that dmm evaluate wrote.") from error
    missing = [key for key in _KEYS if not isinstance(figures, dict) or key not in figures]
    if missing:
        raise UserError(f"'{file}' has no '{missing[0]}', so it is no report of dmm evaluate.")
    return dict(figures)
