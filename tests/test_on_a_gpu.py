"""From teachers to a model that paints, on a GPU: what lies where is seen nowhere else."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline
from PIL import Image, ImageChops
from safetensors.torch import load_file

from dmm.cli import main
from dmm.files.yaml import read_yaml, write_yaml
from dmm.formats.single_file import save_single_file

UNET = "unet/diffusion_pytorch_model.safetensors"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def models(sd1_folder, tmp_path_factory):
    """A base, two teachers of it, and one that is added later."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(1).save_pretrained(folder / "ink")
    save_single_file(tiny_pipeline(2), folder / "photo.safetensors")
    tiny_pipeline(3).save_pretrained(folder / "line")
    (folder / "base").symlink_to(sd1_folder)
    (folder / "prompts.txt").write_text("a cat\na dog\na house\n")
    return folder


@pytest.fixture
def dmm(monkeypatch, tmp_path):
    """A command that ends well, in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        try:
            assert main([*map(str, arguments)]) == 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def write_recipe(path, precision="fp32", **changes):
    recipe = {
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 3, "steps": 1, "guidance": 2, "own": 0.5}},
        "size": 16,
        "styles": {"rank": 0},
        "training": {
            **{"steps": 4, "batch_size": 6, "micro_batch_size": 3, "learning_rate": 1e-3, "precision": precision},
            **{"ema_decay": 0.5, "gradient_checkpointing": True},
        },
        "losses": {"feature": 0.1, "adversarial": 0.01},
        "checkpoint": {"every": 2},
        "logging": {"every": 1, "sample_every": 2, "sample_steps": 2, "score_error_every": 2},
        **changes,
    }
    path.write_text(write_yaml(recipe))
    return path


TWO = {
    "base": "base",
    "start": "average",
    "teachers": [{"name": "ink", "model": "ink"}, {"name": "photo", "model": "photo.safetensors"}],
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_merge_its_second_stage_and_a_style_more(dmm, models, tmp_path, precision):
    merged, second, more = (tmp_path / name for name in ("merged", "second", "more"))
    dmm("merge", write_recipe(models / "merge.yaml", precision, **TWO), "--output", merged)
    own = {"prompts": "prompts.txt", "count": 3, "steps": 1, "guidance": 2, "own": 0.4, "student": 0.4}
    recipe = write_recipe(
        models / "second.yaml", precision, **{**TWO, "start": str(merged), "data": {"synthesize": own}}
    )
    dmm("merge", recipe, "--output", second)
    line = {"teachers": [{"name": "line", "model": "line"}]}
    dmm("add", second, write_recipe(models / "add.yaml", precision, **line), "--output", more)
    for folder in (merged, second, more):
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        assert all(torch.tensor(value).isfinite() for value in last.values())
        assert last["score_error"] > 0
        assert all(tensor.isfinite().all() for tensor in load_file(folder / UNET).values())
    dmm("generate", more, "a cat", "--style", "ink=0.5,line=0.5", "--steps", 2, "--output", tmp_path / "cat.png")
    assert (tmp_path / "cat.png").exists()


def test_it_resumes_to_the_bit(dmm, models, tmp_path):
    recipe = write_recipe(models / "whole.yaml", **TWO)
    dmm("merge", recipe, "--output", tmp_path / "whole")
    recipe_cut = write_recipe(models / "cut.yaml", **TWO, training={**read_yaml(recipe)[0]["training"], "steps": 2})
    dmm("merge", recipe_cut, "--output", tmp_path / "cut")
    dmm("merge", recipe, "--output", tmp_path / "cut", "--resume")
    whole, cut = (load_file(tmp_path / name / UNET) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_it_is_evaluated(dmm, models, tmp_path):
    dmm("merge", write_recipe(models / "judged.yaml", **TWO), "--output", tmp_path / "merged")
    pictures = ("--num-images", 322, "--width", 32, "--height", 32, "--steps", 1, "--guidance", 2)
    prompts = ("--prompts", models / "prompts.txt")
    dmm("evaluate", tmp_path / "merged", *pictures, *prompts, "--extractor", "judge", "--output", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["fidt"] > 0
    assert (tmp_path / "report" / "report.html").exists()


def test_an_offloaded_model_paints_as_one_that_is_not(dmm, merged, tmp_path):
    for name, options in (("plain", []), ("model", ["--offload", "model"]), ("layers", ["--offload", "sequential"])):
        command = ["generate", merged, "a cat", "--style", "ink", "--steps", 2, "--precision", "fp32", *options]
        dmm(*command, "--output", tmp_path / f"{name}.png")
    plain, model, layers = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "model", "layers"))
    for offloaded in (model, layers):
        assert max(high for _, high in ImageChops.difference(plain, offloaded).getextrema()) <= 1


def test_a_merge_runs_on_the_processor_where_it_is_told_to(dmm, models, tmp_path):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dmm("merge", write_recipe(models / "cpu.yaml", **TWO), "--output", tmp_path / "merged", "--device", "cpu")
    assert torch.cuda.max_memory_allocated() == before
    assert (tmp_path / "merged" / UNET).exists()
