"""The student's pictures under the teachers'."""

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from dmm.files.pictures import grid


def teacher_over_student(
    prompts: Sequence[str], teachers: Mapping[str, Sequence[Tensor]], students: Mapping[str, Sequence[Tensor]]
) -> Image.Image:
    """A grid with a column a style; each prompt has a row of teachers and under it the student's, of the same noise.

    Args:
        teachers, students: by style, a picture of every prompt, (3, H, W), 8 bits.
    """
    cells, labels = [], []
    for i, prompt in enumerate(prompts):
        for who, pictures in (("teacher", teachers), ("student", students)):
            labels.append(f"{prompt}: {who}" if who == "teacher" else who)
            cells += [Image.fromarray(pictures[style][i].permute(1, 2, 0).numpy()) for style in pictures]
    return grid(cells, len(teachers), row_labels=labels, column_labels=list(teachers))
