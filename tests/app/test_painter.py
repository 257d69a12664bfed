"""The page's model paints what `dmm generate` paints, and tells it in the picture."""

import io
from dataclasses import replace

import numpy as np
import pytest
from conftest import STYLE_NAMES, tiny_styled
from PIL import Image

from dmm.app import markup
from dmm.app.controls import STYLES, Controls, restore_controls
from dmm.app.painted import Painted
from dmm.app.painter import Painter
from dmm.app.uploads import read_sent_parameters
from dmm.cli import main
from dmm.errors import UserError

CONTROLS = Controls(
    prompt="a cat", negative="blurry", seed=2, count=2, steps=3, guidance=4.0, width=16, height=16,
    weights={"ink": 0.7, "photo": 0.3, "clay": 0.0},
)  # fmt: skip


@pytest.fixture
def painter():
    return Painter(tiny_styled(), model="merged")


def result(job):
    return list(job.watch(every=0.01))[-1]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def test_pictures_are_those_of_generate_and_set_the_controls_again(painter, merged, tmp_path):
    painted = result(painter.paint(CONTROLS))
    settings = [
        "--style",
        "ink=0.7,photo=0.3",
        "--seed",
        "2-3",
        "--steps",
        "3",
        "--guidance",
        "4",
        "--negative",
        "blurry",
    ]
    assert (
        main(["generate", str(merged), "a cat", *settings, "--negative", "blurry", "--output", f"{tmp_path}/pictures"])
        == 0
    )
    for one, file in zip(painted, sorted((tmp_path / "pictures").iterdir()), strict=True):
        assert abs(pixels(one.png) - pixels(file.read_bytes())).max() <= 2
        (tmp_path / "sent.png").write_bytes(one.png)
        told = read_sent_parameters(tmp_path / "sent.png")
        restored = restore_controls(told, STYLE_NAMES, Controls(weights=CONTROLS.weights))
        assert (
            result(painter.paint(restored))[0].png == one.png
            or abs(pixels(result(painter.paint(restored))[0].png) - pixels(one.png)).max() <= 2
        )


def test_a_region_has_a_style_of_its_own(painter, merged, tmp_path):
    (painted,) = result(painter.paint(replace(CONTROLS, count=1, regions="0.5,0,1,1:clay:a dog")))
    settings = ["--style", "ink=0.7,photo=0.3", "--seed", "2", "--steps", "3", "--guidance", "4"]
    region = ["--region", "0.5,0,1,1:clay:a dog", "--negative", "blurry", "--output", f"{tmp_path}/own.png"]
    assert main(["generate", str(merged), "a cat", *settings, *region]) == 0
    assert abs(pixels(painted.png) - pixels((tmp_path / "own.png").read_bytes())).max() <= 2


def test_every_style_is_there(painter):
    painted = result(painter.paint(Controls(prompt="a cat", steps=2, width=16, height=16, what=STYLES,
                                            weights=CONTROLS.weights)))  # fmt: skip
    assert [one.label for one in painted] == STYLE_NAMES
    assert len({one.png for one in painted}) == 3


def test_an_image_to_begin_with_is_painted_over(painter, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    Image.new("L", (40, 40), 0).save(tmp_path / "black.png")
    plain, begun, kept = (
        pixels(result(painter.paint(CONTROLS, *files))[0].png)
        for files in ((), (tmp_path / "red.png",), (tmp_path / "red.png", tmp_path / "black.png"))
    )
    assert abs(plain - begun).max() > 2
    assert abs(begun - kept).max() > 2
    with pytest.raises(UserError, match="A mask is for an image"):
        painter.paint(CONTROLS, None, tmp_path / "black.png")


def test_a_mix_is_exported_where_that_is_allowed(painter, tmp_path):
    with pytest.raises(UserError, match="without --exports"):
        painter.export(CONTROLS, "mix")
    allowed = Painter(tiny_styled(), model="merged", exports=tmp_path)
    for name in ("../mix", "", "a/b", ".mix", "x" * 65):
        with pytest.raises(UserError, match="file's name"):
            allowed.export(CONTROLS, name)
    assert result(allowed.export(CONTROLS, "mix")) == tmp_path / "mix.safetensors"
    assert list(tmp_path.iterdir()) == [tmp_path / "mix.safetensors"]
    with pytest.raises(UserError, match="exists"):
        allowed.export(CONTROLS, "mix")


def test_what_people_type_is_shown_as_they_typed_it():
    shown = markup.pictures([Painted(b"png", '<script>"', 'a"onload="b.png')], (512, 512))
    assert "<script" not in shown
    assert 'download="a&quot;onload=&quot;b.png"' in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "lets others in: add --auth"),
        (["--port", "0"], "from 1 to 65535"),
        (["--auth", "anna"], "write NAME:PASSWORD"),
        (["--exports", "nowhere"], "no such folder"),
    ],
    ids=str,
)
def test_serve_refuses_at_once(merged, capsys, options, message):
    assert main(["serve", str(merged), *options]) == 2
    assert message in capsys.readouterr().err


def test_serve_takes_a_model_or_a_run(merged, tmp_path, capsys):
    assert main(["serve"]) == 2
    assert main(["serve", str(merged), "--run", str(merged)]) == 2
    assert capsys.readouterr().err.count("one of them") == 2
    assert main(["serve", "--run", str(tmp_path)]) == 2
    assert "not the folder of a merge" in capsys.readouterr().err


def test_a_stock_model_is_refused(sd1_folder, capsys):
    assert main(["serve", str(sd1_folder)]) == 2
    assert "stock model without styles" in capsys.readouterr().err
