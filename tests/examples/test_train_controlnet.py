"""What the small ControlNet is trained to follow."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))
from train_controlnet import edges, tensor


def test_edges_are_where_neighbours_differ_and_nowhere_else():
    picture = Image.new("RGB", (16, 16), "white")
    picture.paste((200, 0, 0), (4, 4, 12, 12))
    found = np.asarray(edges(picture))[..., 0]
    assert set(np.unique(found)) == {0, 255}
    assert found[3, 4:12].all()  # on the brighter side
    assert not found[6:10, 6:10].any()
    assert not found[:2].any()
    assert not found[:, -2:].any()


def test_a_picture_becomes_a_tensor_of_its_shape():
    assert tensor(Image.new("RGB", (4, 2), (255, 0, 51))).shape == (3, 2, 4)
    assert tensor(Image.new("RGB", (4, 2), (255, 0, 51)))[:, 0, 0].tolist() == [1, 0, np.float32(0.2)]
