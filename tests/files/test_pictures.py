import numpy as np
import pytest
from PIL import Image, ImageFont

from dmm.errors import UserError
from dmm.files.pictures import GAP, MARGIN, _wrap, grid, save_png


def pictures(count, size=(32, 32)):
    noise = np.random.default_rng(0).integers(0, 256, (count, *size[::-1], 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


def cell(canvas, row, column, side, num_rows, num_columns):
    """The picture in a cell, found from the right and bottom, where there are no labels."""
    right = canvas.width - MARGIN - (num_columns - 1 - column) * (side + GAP)
    bottom = canvas.height - MARGIN - (num_rows - 1 - row) * (side + GAP)
    return canvas.crop((right - side, bottom - side, right, bottom))


@pytest.mark.parametrize("labelled", [False, True])
def test_every_picture_is_in_its_cell_and_enlarged_by_whole_pixels(labelled):
    images = pictures(6)
    labels = {"row_labels": ["a cat", "a house " * 30], "column_labels": ["0", "1", "x" * 200]} if labelled else {}
    canvas = grid(images, 3, **labels)
    for i, image in enumerate(images):
        shown = cell(canvas, *divmod(i, 3), side=128, num_rows=2, num_columns=3)
        assert (np.asarray(shown)[::4, ::4] == np.asarray(image)).all()
        assert (np.asarray(shown)[3::4, 3::4] == np.asarray(image)).all()


def test_labels_have_room_of_their_own():
    images = pictures(2, (512, 512))
    bare, labelled = grid(images, 2), grid(images, 2, row_labels=["a cat"], column_labels=["seed 0", "seed 1"])
    assert bare.size == (2 * 512 + GAP + 2 * MARGIN, 512 + 2 * MARGIN)
    left, top = labelled.width - bare.width, labelled.height - bare.height
    assert np.asarray(labelled.crop((0, top, left, labelled.height))).min() < 100  # black on white
    assert np.asarray(labelled.crop((left, 0, labelled.width, top))).min() < 100


def test_labels_break_where_people_would_break_them():
    font = ImageFont.load_default(13)

    def wrapped(text, width=128, max_lines=6):
        lines = _wrap(text, font, width, max_lines)
        assert all(font.getlength(line) <= width for line in lines)
        return lines

    assert wrapped("noto 0.875\nopenmoji-black 0.125") == ["noto 0.875", "openmoji-black", "0.125"]
    assert wrapped("0-0.6: openmoji-black\n0.6-1: ink") == ["0-0.6:", "openmoji-black", "0.6-1: ink"]
    assert wrapped("a-very-long-name-of-a-style 0.5") == ["a-very-long-name-of-", "a-style 0.5"]
    assert wrapped("a red cat on a red mat, sitting", max_lines=1)[0].endswith("…")
    assert "".join(wrapped("x" * 60)) == "x" * 60


def test_a_last_row_may_be_short():
    canvas = grid(pictures(3), 2)
    assert (np.asarray(cell(canvas, 1, 1, 128, 2, 2)) == 255).all()


def test_pictures_of_two_sizes_and_labels_of_another_number_are_refused():
    with pytest.raises(ValueError, match="one size"):
        grid([*pictures(1), *pictures(1, (64, 64))], 2)
    with pytest.raises(ValueError, match="2 columns and 1 column labels"):
        grid(pictures(4), 2, column_labels=["0"])


def test_a_saved_picture_is_the_picture(tmp_path):
    (image,) = pictures(1)
    save_png(image, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as again:
        assert (np.asarray(again) == np.asarray(image)).all()


def test_a_picture_that_exists_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "a.png"
    first, second = pictures(2)
    save_png(first, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists"):
        save_png(second, path)
    assert path.read_bytes() == before
    save_png(second, path, overwrite=True)
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]
