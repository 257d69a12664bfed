"""A report's figures on disk."""

import json
from pathlib import Path
from typing import Any

from dmm.errors import UserError

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
        figures = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{path}' is no report: {error.strerror}. Name a folder that dmm evaluate wrote.") from error
    except ValueError as error:
        raise UserError(f"'{file}' is not a report, but a damaged or another file: {error}.") from error
    missing = [key for key in _KEYS if not isinstance(figures, dict) or key not in figures]
    if missing:
        raise UserError(f"'{file}' has no '{missing[0]}', so it is no report of dmm evaluate.")
    return dict(figures)
