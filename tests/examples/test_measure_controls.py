"""How far a picture follows a control: all where it is the picture that the condition was made of."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from dmm.data.conditions import MAKERS

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))
from measure_controls import AGREEMENTS


@pytest.fixture
def picture():
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste((200, 0, 0), (4, 6, 20, 28))
    return picture


@pytest.mark.parametrize(("control", "best"), [("edges", 1), ("colours", 0), ("silhouette", 1)])
def test_a_picture_follows_its_own_condition_wholly_and_anothers_less(picture, control, best):
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    agree, image = AGREEMENTS[control], MAKERS[control](picture)
    assert agree(image, picture) == best
    assert abs(agree(image, other) - best) > 0.1
