"""Merges of every family of rectified flow, killed and resumed."""

import signal

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from helpers import die, in_child
from tiny_families import TINY

import dmm
from dmm.cli import main
from dmm.files.yaml import write_yaml
from dmm.pipeline.sampling import sample
from dmm.training.trainer import Trainer

ADAPTERS, PROMPTS = {"rank": 2, "train": "adapters", "samples": 4}, {"rank": 0, "train": "all"}


def recipe_of(tmp_path, name, styles, **teachers):
    for model, new in {"base": lambda: TINY[name](0), "one": lambda: TINY[name](1), **teachers}.items():
        new().save_pretrained(tmp_path / model)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    recipe = {
        "base": "base",
        "teachers": [{"name": one, "model": one} for one in ("one", *teachers)],
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 2, "steps": 2}},
        "size": 16,
        "styles": styles,
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
        "logging": {"every": 1, "sample_every": None},
        "checkpoint": {"every": 2},
    }
    (tmp_path / "recipe.yaml").write_text(write_yaml(recipe))
    return tmp_path / "recipe.yaml"


def merge(recipe, output, *more):
    try:
        return main(["merge", str(recipe), "--output", str(output), *more])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("name", "styles"), [("sd3", ADAPTERS), ("flux", ADAPTERS), ("z_image", PROMPTS)])
def test_a_merge_that_was_killed_ends_as_one_that_was_not(name, styles, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = recipe_of(tmp_path, name, styles, two=lambda: TINY[name](2))
    assert merge(path, tmp_path / "whole") == 0
    step = Trainer._step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda self, number: die() if number == 3 else step(self, number))
        assert in_child(lambda: merge(path, tmp_path / "killed")) == signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("**/checkpoints/step-*"))) == 1
    assert not (tmp_path / "killed" / "model_index.json").exists()
    assert merge(path, tmp_path / "killed", "--resume") == 0
    whole, killed = (dmm.load_pipeline(tmp_path / one) for one in ("whole", "killed"))
    assert all(t.equal(killed.transformer.state_dict()[n]) for n, t in whole.transformer.state_dict().items())
    for style in ("one", "two"):
        for pipe in (whole, killed):
            dmm.set_style(pipe, style)
        one, other = (next(sample(pipe, ["a cat"], [0], steps=2, width=16, height=16)) for pipe in (whole, killed))
        assert np.array_equal(np.asarray(one), np.asarray(other))
