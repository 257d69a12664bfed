"""A report's folder: the figures as JSON, what they look like, and a page of it all."""

import json
from pathlib import Path

from dmm.evaluation.evaluate import Evaluation
from dmm.files.outputs import new_folder
from dmm.files.pictures import save_png
from dmm.report.figures import draw_fid_matrix, draw_score_error
from dmm.report.files import REPORT
from dmm.report.page import write_page
from dmm.report.pictures import teacher_over_student

PAGE = "report.html"
FID_MATRIX = "fid_matrix.png"
SCORE_ERROR = "score_error.png"
GRID = "grid.png"


def write_report(evaluation: Evaluation, folder: Path, *, overwrite: bool = False) -> None:
    """Write a report, whole or not at all.

    Raises: UserError: the folder is not empty, or cannot be written.
    """
    figures = evaluation.figures
    with new_folder(folder, overwrite=overwrite) as building:
        text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False)
        (building / REPORT).write_text(text + "\n", encoding="utf-8")
        if figures["fid_matrix"]:
            draw_fid_matrix(figures, building / FID_MATRIX)
        if figures["score_error"]:
            draw_score_error(figures["score_error"], building / SCORE_ERROR)
        picture = teacher_over_student(evaluation.prompts, evaluation.teachers, evaluation.students)
        save_png(picture, building / GRID)
        write_page(figures, building, building / PAGE)
