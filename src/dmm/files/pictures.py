"""Pictures on disk and side by side: PNG files that say what they were made from, and labelled grids."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dmm.files.outputs import new_file
from dmm.files.parameters import Parameters

SMALLEST_CELL = 128  # pixels; smaller pictures are enlarged in a grid
GAP = 4
MARGIN = 10
FONT_SIZES = (13, 28)
COLUMN_LABEL_LINES = 6

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_png(image: Image.Image, path: Path, parameters: Parameters | None = None, *, overwrite: bool = False) -> None:
    """Write a PNG, whole or not at all, with ``parameters`` in the text chunk of that name.

    Raises: UserError: the file exists and may not be overwritten, or cannot be written.
    """
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(encode_png(image, parameters))


def encode_png(image: Image.Image, parameters: Parameters | None = None) -> bytes:
    """A picture as the bytes of a PNG, with ``parameters`` in the text chunk of that name."""
    info = PngInfo()
    if parameters is not None:
        info.add_text("parameters", str(parameters))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    return encoded.getvalue()


def grid(
    images: Sequence[Image.Image],
    num_columns: int,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """Pictures in rows and columns on white, with labels to the left of the rows and above the columns.

    Pictures smaller than 128 pixels are enlarged by a whole number, every pixel a square. Labels are
    wrapped, behind a hyphen where a word is too long, and cut with an ellipsis where there is no room.

    Args:
        images: at least one, row by row, all of one size; the last row may be short.
        row_labels, column_labels: one a row and one a column, or none.
    Returns: RGB.
    Raises: ValueError: the sizes differ, or the labels do not fit the rows or columns in number.
    """
    num_rows = -(-len(images) // num_columns)
    if len({image.size for image in images}) != 1:
        raise ValueError(f"A grid takes pictures of one size, not {sorted({image.size for image in images})}.")
    for name, labels, count in (("row", row_labels, num_rows), ("column", column_labels, num_columns)):
        if labels and len(labels) != count:
            raise ValueError(f"The grid has {count} {name}s and {len(labels)} {name} labels.")

    scale = max(1, -(-SMALLEST_CELL // max(images[0].size)))
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default(min(max(height // 20, FONT_SIZES[0]), FONT_SIZES[1]))
    line_height = round(1.2 * font.getbbox("Åg")[3])
    label_width = max(width // 2, SMALLEST_CELL)
    rows = [_wrap(label, font, label_width, max(1, height // line_height)) for label in row_labels]
    columns = [_wrap(label, font, width, COLUMN_LABEL_LINES) for label in column_labels]
    left = max((font.getlength(line) for lines in rows for line in lines), default=0)
    top = max((len(lines) for lines in columns), default=0) * line_height
    left = MARGIN + (round(left) + MARGIN if rows else 0)
    top = MARGIN + (top + MARGIN // 2 if columns else 0)

    size = (
        left + num_columns * (width + GAP) - GAP + MARGIN,
        top + num_rows * (height + GAP) - GAP + MARGIN,
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        row, column = divmod(i, num_columns)
        place = (left + column * (width + GAP), top + row * (height + GAP))
        canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    for row, lines in enumerate(rows):
        middle = top + row * (height + GAP) + (height - len(lines) * line_height) // 2
        for i, line in enumerate(lines):
            draw.text((left - MARGIN, middle + i * line_height), line, "black", font, anchor="ra")
    for column, lines in enumerate(columns):
        middle = left + column * (width + GAP) + width // 2
        bottom = top - MARGIN // 2 - len(lines) * line_height
        for i, line in enumerate(lines):
            draw.text((middle, bottom + i * line_height), line, "black", font, anchor="ma")
    return canvas


def _wrap(text: str, font: Font, width: float, max_lines: int) -> list[str]:
    """``text`` in at most ``max_lines`` lines no wider than ``width`` pixels."""
    lines = [line for paragraph in text.split("\n") for line in _fill(paragraph.split(), " ", font, width)]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last + "…"]
    return lines


def _fill(parts: Sequence[str], between: str, font: Font, width: float) -> list[str]:
    """Lines of as many parts each as are no wider than ``width``; a part that is by itself is broken."""
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}{between}{part}" if lines[-1] else part
        if font.getlength(joined) <= width:
            lines[-1] = joined
        elif font.getlength(part) <= width or len(part) == 1:
            lines.append(part)
        else:  # where people would break it, or anywhere
            smaller = [one for one in re.split(r"(?<=[-_/:])", part) if one]
            lines += _fill(smaller if len(smaller) > 1 else list(part), "", font, width)
    return [line for line in lines if line]
