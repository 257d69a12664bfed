"""Commands on a tiny merged model of every family; SD 1.x has files of its own."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline
from PIL import Image
from tiny_families import TINY

import dmm
from dmm.cli import main
from dmm.evaluation import evaluate, held_out
from dmm.families import FAMILIES, denoiser_of
from dmm.files.parameters import model_hash, read_parameters
from dmm.files.yaml import write_yaml
from dmm.models.styles import StylePrompts
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import add_styles, stock_twin

STYLES = ["ink", "photo"]


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "sd1"])
def models(request, tmp_path_factory):
    """A merged model, its styles as stock folders, one more teacher, and prompts; read only."""
    at = tmp_path_factory.mktemp(request.param)
    pipe = TINY[request.param](seed=0)
    torch.manual_seed(1)
    prompts = StylePrompts(STYLES, FAMILIES[request.param].width(denoiser_of(pipe)))
    torch.nn.init.normal_(prompts.linear_2.weight, std=2)
    add_styles(pipe, prompts)
    dmm.save_pipeline(pipe, at / "merged")
    for name in STYLES:
        stock_twin(pipe, name).save_pretrained(at / name)
    TINY[request.param](seed=3).save_pretrained(at / "line")
    (at / "prompts.txt").write_text("a cat\na dog\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(at / "cache"))
        yield FAMILIES[request.param], at
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*words):
    assert main([str(word) for word in words]) == 0


def paint(path, style):
    pipe = dmm.load_pipeline(path)
    dmm.set_style(pipe, style)
    return np.asarray(next(sample(pipe, ["a cat"], [0], steps=2, width=16, height=16)))


def test_a_picture_is_painted_and_tells_the_models_hash(models, tmp_path):
    family, at = models
    told = ("--style", "ink", "--width", "16", "--height", "16", "--steps", "2", "--device", "cpu")
    run("generate", at / "merged", "a cat", *told, "--output", tmp_path / "out")
    (picture,) = (tmp_path / "out").rglob("*.png")
    assert Image.open(picture).size == (16, 16)
    told = model_hash(at / "merged", family.denoiser.name)
    assert told is not None
    assert read_parameters(picture)["Model hash"] == told


def test_a_merge_of_its_own_teachers_is_measured_and_compared(models, dino, tmp_path, monkeypatch):
    _, at = models
    monkeypatch.setattr(evaluate, "NUM_QUICK_LATENTS", 2)
    monkeypatch.setattr(held_out, "NUM_BANDS", 2)
    teachers = [word for name in STYLES for word in ("--teacher", f"{name}={at / name}")]
    told = ("--prompts", at / "prompts.txt", "--num-images", "20", "--steps", "1", "--guidance", "1", "--quick")
    size = ("--width", "16", "--height", "16", "--precision", "fp32", "--extractor", f"dino={dino}")
    run("evaluate", at / "merged", *teachers, "--base", at / "line", *told, *size, "--output", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["score_error"]["by_style"] == pytest.approx(dict.fromkeys(STYLES, 0), abs=1e-4)
    run("compare", f"a={tmp_path / 'report'}", f"b={tmp_path / 'report'}", "--output", tmp_path / "comparison")
    assert "score error" in (tmp_path / "comparison" / "comparison.md").read_text().lower()


def test_a_style_comes_and_another_goes_and_the_rest_is_painted_as_before(models, tmp_path):
    _, at = models
    recipe = {
        "teachers": [{"name": "line", "model": "line"}],
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 2, "steps": 1, "guidance": 1}},
        "size": 16,
        "styles": {"rank": 2, "samples": 4},
        "training": {"steps": 1, "batch_size": 2, "precision": "fp32"},
        "logging": {"sample_every": None, "score_error_every": None},
    }
    (at / "more.yaml").write_text(write_yaml(recipe))
    run("add", at / "merged", at / "more.yaml", "--output", tmp_path / "more")
    assert dmm.style_names(dmm.load_pipeline(tmp_path / "more")) == [*STYLES, "line"]
    run("remove", tmp_path / "more", "ink", "--output", tmp_path / "less")
    assert dmm.style_names(dmm.load_pipeline(tmp_path / "less")) == ["photo", "line"]
    for style, before in {"photo": at / "merged", "line": tmp_path / "more"}.items():
        assert np.array_equal(paint(tmp_path / "less", style), paint(before, style))


def test_a_teacher_of_another_family_is_refused(models, tmp_path, capsys):
    family, at = models
    tiny_pipeline().save_pretrained(tmp_path / "sd1")
    words = ["evaluate", at / "merged", "--teacher", f"ink={tmp_path / 'sd1'}", "--teacher", f"photo={at / 'photo'}"]
    words += ["--prompts", at / "prompts.txt", "--quick", "--extractor", "judge", "--output", tmp_path / "report"]
    assert main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert f"teacher 'ink': {tmp_path / 'sd1'} is SD 1.x (model_index.json: StableDiffusionPipeline); " in told
    assert f"{family.title} was expected" in told


def test_a_folder_without_its_denoisers_config_is_told_so(models, tmp_path, capsys):
    family, at = models
    shutil.copytree(at / "line", tmp_path / "line")
    missing = tmp_path / "line" / family.denoiser.name / "config.json"
    missing.unlink()
    assert main(["generate", str(tmp_path / "line"), "a cat", "--output", str(tmp_path / "out")]) == 2
    assert f"{missing}: no such file, but a stock pipeline folder has one." in capsys.readouterr().err


def test_a_folder_of_parts_of_two_families_is_told_so(models, tmp_path, capsys):
    family, at = models
    if family.name not in ("sd2", "sdxl"):
        return  # their transformers are of other classes, and those of the index are asked for first
    index = json.loads((at / "line" / "model_index.json").read_text())
    kind = {"sd2": "StableDiffusionXLPipeline", "sdxl": "StableDiffusionPipeline"}[family.name]
    shutil.copytree(at / "line", tmp_path / "line")
    (tmp_path / "line" / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    assert main(["generate", str(tmp_path / "line"), "a cat", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert f"its model_index.json names a {kind}" in told
    assert f"unet/config.json describes that of {family.title}. Its parts do not belong together" in told
