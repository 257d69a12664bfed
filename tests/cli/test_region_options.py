"""Regions on the command line."""

import argparse

import numpy as np
import pytest
from PIL import Image

from dmm.cli import main
from dmm.cli.region_options import read_region


def paint(merged, output, *options):
    argv = ["generate", str(merged), "a cat", "--steps", "2", "--guidance", "2", "--output", str(output), *options]
    return main(argv)


@pytest.mark.parametrize(
    ("text", "area", "style", "prompt"),
    [
        ("0,0,0.5,1:ink", (0, 0, 0.5, 1), {"ink": 1.0}, None),
        ("8,0,16,12:ink=0.7,photo=0.3:a dog: small", (8, 0, 16, 12), {"ink": 0.7, "photo": 0.3}, "a dog: small"),
    ],
)
def test_a_region_is_read(text, area, style, prompt):
    region = read_region(text)
    assert (region.area, region.style, region.prompt) == (area, style, prompt)
    assert str(region) == text


@pytest.mark.parametrize("text", ["ink", "0,0,1,1", "0,0,1,1:", ":ink", "0.5,0,8,8:ink"])
def test_what_is_no_region_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"write|no style"):
        read_region(text)


def test_regions_paint_and_the_picture_says_so(merged, tmp_path, capsys):
    assert paint(merged, tmp_path / "a.png", "--style", "ink", "--region", "0.5,0,1,1:photo:a dog") == 0
    assert paint(merged, tmp_path / "b.png", "--style", "ink", "--region", "8,0,16,16:photo:a dog") == 0
    assert paint(merged, tmp_path / "c.png", "--style", "ink") == 0
    one, same, plain = (Image.open(tmp_path / f"{name}.png") for name in "abc")
    assert (np.asarray(one) == np.asarray(same)).all()
    assert (np.asarray(one) != np.asarray(plain)).any()
    assert 'Style: ink, Regions: "0.5,0,1,1:photo:a dog"' in one.info["parameters"]


def test_a_panorama_goes_from_style_to_style(merged, tmp_path, capsys):
    assert paint(merged, tmp_path / "wide.png", "--styles", "ink,photo", "--panorama", "48") == 0
    picture = Image.open(tmp_path / "wide.png")
    assert picture.size == (48, 16)
    assert 'Panorama: "ink, photo"' in picture.info["parameters"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--region", "0,0,1,1:inc"], "no style 'inc'"),
        (["--region", "0,0,1,1:ink", "--styles", "all"], "leave out --styles"),
        (["--region", "nothing.png:ink"], "no mask 'nothing.png'"),
        (["--panorama", "48"], "name them with --styles"),
        (["--panorama", "48", "--styles", "ink,photo", "--width", "32"], "leave out --width"),
        (["--region", "0,0,1,1:ink", "--style", "0-0.5:ink;0.5-1:photo"], "the same at all times"),
        (["--region", "8,0,99,16:ink"], "16 x 16"),
    ],
)
def test_what_does_not_go_together_is_refused(merged, tmp_path, capsys, options, told):
    assert paint(merged, tmp_path / "a.png", *options) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
