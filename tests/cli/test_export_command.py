import json
import re

import pytest
import torch
from conftest import STYLE_NAMES
from diffusers import StableDiffusionPipeline
from helpers import copy_folder, paint
from safetensors.torch import load_file

from dmm.cli import main
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.styled import load_pipeline, set_style, style_names


@pytest.fixture
def export(merged, tmp_path, monkeypatch):
    """``dmm export`` of the tiny merged model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args, model=merged: main(["export", str(model), *map(str, args)])


def error_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dmm: error: ")
    return lines[0]


def test_a_mix_becomes_a_stock_checkpoint(export, tmp_path, merged, capsys):
    assert export("--style", "ink=0.7,photo=0.3", "--output", "mix/") == 0
    assert capsys.readouterr().out.startswith("Wrote mix: the style ink=0.7,photo=0.3 as a stock checkpoint, fp32, in")
    pipe = load_pipeline(merged)
    set_style(pipe, {"ink": 0.7, "photo": 0.3})
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "mix", safety_checker=None)
    assert abs(paint(plain) - paint(pipe)).max() <= 2


def test_all_styles_and_the_authors_layout_and_back(export, tmp_path, merged, capsys):
    assert export("--all", "--single-file", "--precision", "fp16", "--output", "all") == 0
    told = capsys.readouterr()
    assert "a patch in styles/, a difference in loras/, fp16, in" in told.out
    assert re.search(r"note: what embeds time is too narrow here .* would be \d+\.\d% off\.", told.err)
    assert {path.name for path in (tmp_path / "all/loras").glob("*.safetensors")} == {
        f"{style}.diff.safetensors" for style in STYLE_NAMES
    }
    assert {path.stem for path in (tmp_path / "all/styles").iterdir()} == set(STYLE_NAMES)
    assert load_file(tmp_path / "all/styles/ink.safetensors").keys() == {"model.diffusion_model.time_embed.2.bias"}
    assert export("--authors", "--output", "theirs.safetensors") == 0
    # and on from theirs
    options = ["--config", merged, "--style", "clay", "--output", "clay.safetensors"]
    assert export(*options, model=tmp_path / "theirs.safetensors") == 0
    assert export("--style", "clay", "--output", "ours.safetensors") == 0
    theirs, ours = (load_file(tmp_path / f"{name}.safetensors") for name in ("clay", "ours"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    assert style_names(load_pipeline(tmp_path / "theirs.safetensors", config=merged)) == STYLE_NAMES


def test_a_schedule_that_a_single_file_cannot_tell_is_told(export, merged, tmp_path, capsys):
    model = copy_folder(merged, tmp_path / "model")
    config = model / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.02}))
    for output, told in (("ink.safetensors", True), ("ink", False)):
        assert export("--style", "ink", "--output", output, model=model) == 0
        assert ("its noise schedule is not the usual one" in capsys.readouterr().err) == told
    for source, options in (("ink.safetensors", {"config": merged}), ("ink", {})):
        opened = open_pipeline(ModelSource(tmp_path / source, **options))
        assert opened.scheduler.config.beta_end == 0.02


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output", "x"], "one of the arguments --style --all --authors is required"),
        (["--style", "ink"], "arguments are required: --output"),
        (["--style", "inc", "--output", "x"], "no style 'inc'; did you mean 'ink'"),
        (["--style", "ink=0.5", "--output", "x"], "must sum to 1"),
        (["--style", "ink", "--all", "--output", "x"], "not allowed with argument"),
        (["--style", "ink", "--single-file", "--output", "x"], "--single-file goes with --all"),
        (["--all", "--output", "x.safetensors"], "--all writes a folder"),
        (["--style", "ink", "--output", "here.safetensors"], "exists. Name another output"),
        (["--style", "ink", "--output", "."], "is not empty"),
    ],
)
def test_mistakes_are_told_in_a_line(export, tmp_path, capsys, args, message):
    (tmp_path / "here.safetensors").write_text("mine")
    assert export(*args) == 2
    assert message in error_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["here.safetensors"]


def test_a_stock_model_is_told(export, sd1_folder, capsys):
    assert export("--style", "ink", "--output", "x", model=sd1_folder) == 2
    assert "it is a stock model without styles" in error_of(capsys)
