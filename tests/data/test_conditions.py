"""Condition images that are made of pictures."""

import numpy as np
import pytest
from PIL import Image

from dmm.data.conditions import MAKERS, colours, edges, maker_named, silhouette
from dmm.errors import UserError


@pytest.fixture
def ring():
    """A red square with a white middle on white."""
    picture = Image.new("RGB", (24, 16), "white")
    picture.paste((200, 0, 0), (4, 4, 12, 12))
    picture.paste("white", (7, 7, 9, 9))
    return picture


def test_edges_are_where_neighbours_differ_and_nowhere_else(ring):
    ring.paste((200, 0, 0), (4, 4, 12, 12))
    found = np.asarray(edges(ring))[..., 0]
    assert set(np.unique(found)) == {0, 255}
    assert found[3, 4:12].all()  # on the brighter side
    assert not found[6:10, 6:10].any()
    assert not found[:2].any()
    assert not found[:, -2:].any()


def test_a_silhouette_is_filled_and_its_ground_is_black_at_every_side(ring):
    found = np.asarray(silhouette(ring))
    expected = np.zeros((16, 24, 3), np.uint8)
    expected[4:12, 4:12] = 255  # the white within is part of the thing
    assert (found == expected).all()


def test_fields_of_colour_keep_one_colour_and_lose_lines(ring):
    plain = Image.new("RGB", (24, 16), (10, 200, 30))
    assert (np.asarray(colours(plain)) == np.asarray(plain)).all()
    found = np.asarray(colours(ring)).astype(int)
    assert np.abs(np.diff(found, axis=1)).max() < 60  # of the 255 that edges had
    assert found[8, 8, 1] < found[8, 20, 1]


@pytest.mark.parametrize("name", ["edges", "colours", "silhouette"])
def test_all_keep_the_pictures_size_and_mode(name, ring):
    found = MAKERS[name](ring)
    assert (found.size, found.mode) == (ring.size, "RGB")


def test_any_modules_function_is_found_by_its_name(ring):
    assert maker_named("edges") is edges
    assert maker_named("PIL.ImageOps:mirror")(ring).size == ring.size


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sketch", "'sketch' makes no condition images; choose from edges"),
        ("no_such_module:f", "'no_such_module:f' names no function: No module named"),
        ("PIL.ImageOps:nothing", "names no function"),
        ("PIL.ImageOps:__name__", "makes no condition images"),
    ],
)
def test_another_name_is_told(name, told):
    with pytest.raises(UserError, match=told):
        maker_named(name)
