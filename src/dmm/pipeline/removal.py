"""A merged model without one of its styles."""

import shutil
from pathlib import Path

from dmm.errors import UserError
from dmm.files.claims import claimed
from dmm.files.outputs import check_new_folder, new_folder
from dmm.files.runs import RECIPE
from dmm.formats.completing import complete_folder
from dmm.formats.folder import copy_model, family_of_folder, known_parts
from dmm.models.side_car import read_side_car, write_side_car
from dmm.models.student import shrink
from dmm.models.style_names import STYLES_FOLDER
from dmm.models.teachers import ModelSource, check_model, locate
from dmm.pipeline.styled import told_of_full_disk


def remove_style(merged: str | Path, name: str, output: Path, *, overwrite: bool = False) -> list[str]:
    """Copy a merged model without the prompt of one style; no other weight changes by a bit.

    The merge's recipe goes along, the record of how the styles that are left were made: it still names the teacher of
    the one that went. Nothing else that the folder may hold is copied.

    Args:
        merged: a folder, or a hub id.
        name: of the style.
        output: the new model's folder.
    Returns: the styles that are left.
    Raises: UserError: no merged model, or a damaged one; no such style, no other style; or the output is not empty,
        or another process's.
    """
    with claimed(output):
        check_new_folder(output, overwrite=overwrite)
        folder = locate(ModelSource(merged))
        style_prompts = read_side_car(folder)
        if style_prompts is None:
            raise UserError(f"{merged} has no {STYLES_FOLDER}/ folder, so it is a stock model without styles.")
        left = shrink(style_prompts, name)
        check_model(ModelSource(folder))
        with (
            new_folder(output, overwrite=overwrite, parts=(*known_parts(), RECIPE)) as building,
            told_of_full_disk(output),
        ):
            copy_model(folder, building, family_of_folder(folder))
            complete_folder(building)
            write_side_car(left, building)
            if (folder / RECIPE).is_file():
                shutil.copyfile(folder / RECIPE, building / RECIPE)
        return left.names
