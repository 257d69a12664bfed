"""A hand of one's own: how its pictures are read, and what is left of a training on them."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import dmm.demo
from dmm.errors import UserError
from dmm.models.teachers import ModelSource, open_pipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))
import train_expert
from drawings import holds_hands, read_hand


@pytest.fixture
def hand(tmp_path):
    """Three pictures of several sizes with captions beside them."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number, (size, colour) in enumerate([((90, 30), "red"), ((64, 64), "blue"), ((5, 10), "green")], 1):
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} thing\n")
    return folder


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train_expert.py", *map(str, words)])
    train_expert.main()


def weights(pipeline):
    return {name: weight.float() for name, weight in pipeline.unet.state_dict().items()}


def test_pictures_are_brought_whole_to_the_size_of_drawings_on_white(hand):
    images, texts = read_hand(hand)
    assert images.shape == (3, 3, 64, 64)
    assert texts == ["a red thing", "a blue thing", "a green thing"]
    wide, square, tall = (np.asarray(one.permute(1, 2, 0)) for one in images)
    assert (wide[22:42] == (255, 0, 0)).all()  # 90 x 30 is 64 x 21
    assert (wide[:21] == 255).all()
    assert (wide[43:] == 255).all()
    assert (square == (0, 0, 255)).all()
    assert (tall[:, 16:48] == (0, 128, 0)).all()
    assert (tall[:, :16] == 255).all()
    assert (tall[:, 48:] == 255).all()


def test_kohyas_folders_of_a_concept_are_a_hand(tmp_path):
    folder = tmp_path / "10_cat"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    assert read_hand(tmp_path)[1] == ["cat"]
    assert not holds_hands(tmp_path)


def test_folders_of_the_eight_hands_are_told_from_a_hand(hand, tmp_path, monkeypatch, capsys):
    assert not holds_hands(hand)
    (tmp_path / "hands" / "noto").mkdir(parents=True)
    (tmp_path / "hands" / "noto" / "metadata.jsonl").touch()
    assert holds_hands(tmp_path / "hands")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--drawings", tmp_path / "hands", "--style", "mine")
    assert "none of 'mine'; name noto, noto-blob" in capsys.readouterr().err


def test_one_folder_is_enough_for_a_lora_of_the_embedded_base(hand, monkeypatch, capsys):
    """It changes what it is put on; it is of these settings, and a run of others is refused."""
    settings = ["--drawings", hand, "--style", "mine", "--steps", 2, "--batch-size", 2, "--lora-rank", 2]
    run(monkeypatch, *settings)
    work = hand.with_name("mine-work")
    file = work / "experts" / "mine.safetensors"
    assert capsys.readouterr().out.splitlines()[-1] == f"Wrote {file}"
    base = weights(open_pipeline(ModelSource(dmm.demo.experts()["base"])))
    ours = weights(open_pipeline(ModelSource(work / "base")))
    assert all(weight.equal(ours[name]) for name, weight in base.items())
    changed = weights(open_pipeline(ModelSource(work / "base", loras=((file, 1.0),))))
    assert any(not weight.equal(changed[name]) for name, weight in base.items())

    first = file.read_bytes()
    run(monkeypatch, *settings)  # finished: only loaded
    assert file.read_bytes() == first
    with pytest.raises(SystemExit):
        run(monkeypatch, *settings[:-1], 4)
    assert "begun with another lora_rank" in capsys.readouterr().err
    (hand / "1.txt").write_text("something else\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, *settings)
    assert "begun with another drawings" in capsys.readouterr().err


def test_all_weights_are_a_stock_folder(hand, monkeypatch, tmp_path):
    words = ["--steps", 2, "--batch-size", 2, "--prediction-type", "v_prediction", "--work", tmp_path / "here"]
    run(monkeypatch, "--drawings", hand, "--style", "mine", *words)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "here" / "experts" / "mine")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert json.loads((tmp_path / "here" / "mine-run" / "settings.json").read_text())["steps"] == 2


@pytest.mark.parametrize("name", ["../mine", "a/b", ".hidden", ""])
def test_a_name_that_leads_elsewhere_is_refused(hand, name):
    args = {"name": name, "style": name, "drawings": hand}
    with pytest.raises(UserError, match="cannot be a file's name"):
        train_expert.train(argparse.Namespace(**args))
