"""Merges of every family, by the command: with style vectors, and with adapters."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLImg2ImgPipeline
from helpers import same_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import TINY, tiny_sdxl

import dmm
from dmm.cli import main
from dmm.errors import UserError
from dmm.families import FAMILIES
from dmm.files.yaml import write_yaml
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.sampling import sample
from dmm.recipes.recipe import load_recipe
from dmm.training.preflight import check_merge

PAPER = {"rank": 0, "train": "all"}
ADAPTERS = {"rank": 2, "train": "adapters", "samples": 8}


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    """``dmm merge`` of two tiny teachers of a family, in this process; returns the result's folder."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "prompts.txt").write_text("a cat\na dog\n")

    def run(family, output, new=None, **changes):
        for seed, name in enumerate(("base", "one", "two")):
            if not (folder / f"{family}-{name}").exists():
                (new or TINY[family])(seed=seed).save_pretrained(folder / f"{family}-{name}")
        recipe = {
            "base": f"{family}-base",
            "teachers": [{"name": name, "model": f"{family}-{name}"} for name in ("one", "two")],
            "data": {"synthesize": {"prompts": "prompts.txt", "count": 2, "steps": 2}},
            "size": 16,
            "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
            "logging": {"every": 1, "score_error_every": 1, "sample_every": 2, "sample_steps": 1},
            "checkpoint": {"every": 2},
        } | changes
        path = folder / f"{output}.yaml"
        path.write_text(write_yaml(recipe))
        try:
            assert main(["merge", str(path), "--output", str(folder / output)]) == 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return folder / output

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield run


def paint(pipe, style=None):
    """(3, H, W)."""
    if style is not None:
        dmm.set_style(pipe, style)
    (picture,) = sample(pipe, ["a cat"], [0], steps=2, width=16, height=16)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()


@pytest.mark.parametrize("styles", [PAPER, ADAPTERS], ids=["paper", "adapters"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "sd1"])
def test_two_become_one_that_paints_in_both_styles(merge, family, styles, tmp_path):
    losses = {"feature": 0.1, "adversarial": 0.01 if styles is PAPER else 0.0}
    folder = merge(family, f"{family}-{styles['train']}", styles=styles, losses=losses)
    pipe = dmm.load_pipeline(folder)
    assert dmm.style_names(pipe) == ["one", "two"]
    assert not paint(pipe, "one").equal(paint(pipe, "two"))
    # once more through the disk
    dmm.set_style(pipe, None)
    dmm.save_pipeline(pipe, tmp_path / "again")
    again = dmm.load_pipeline(tmp_path / "again")
    assert same_weights(again, pipe)
    assert paint(again, "two").equal(paint(pipe, "two"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_student_is_its_base_bit_for_bit(merge, family):
    folder = merge(family, f"{family}-fresh", styles=ADAPTERS | {"train": "none"})
    pipe = dmm.load_pipeline(folder)
    base = open_pipeline(ModelSource(folder.parent / f"{family}-base"))
    assert paint(pipe).equal(paint(base))
    assert same_weights(pipe, base)


def test_pictures_of_several_shapes_teach_in_turn(merge, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for index, size in enumerate([(20, 20), (40, 20), (20, 40), (44, 20)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a cat {index}"}) + "\n")
    (images / "metadata.jsonl").write_text("".join(lines))
    told = {"data": {"images": str(images)}, "size": {"buckets": 16, "step": 4}}
    training = {"steps": 4, "batch_size": 4, "precision": "fp32"}
    folder = merge("sdxl", "buckets", styles=PAPER, training=training, losses={"adversarial": 0.01}, **told)
    resolved = load_recipe(folder / "recipe.yaml")
    assert (resolved.size, resolved.buckets.step) == (16, 4)
    assert not paint(dmm.load_pipeline(folder), "one").equal(paint(dmm.load_pipeline(folder), "two"))


def zero_snr(seed):
    return tiny_sdxl(seed, "v_prediction", rescale_betas_zero_snr=True)


@pytest.mark.parametrize("velocity", ["two", "base"])
def test_teachers_of_two_schedules_meet_where_their_signal_is_equal(merge, velocity):
    def new(seed):
        is_velocity = seed == {"base": 0, "two": 2}[velocity]
        return zero_snr(seed) if is_velocity else tiny_sdxl(seed)

    folder = merge(f"mixed-{velocity}", f"out-{velocity}", new, styles=PAPER, losses={"feature": 0.1})
    pipe = dmm.load_pipeline(folder)
    told = pipe.scheduler.config  # the base's
    assert (told.prediction_type == "v_prediction") == bool(told.rescale_betas_zero_snr) == (velocity == "base")
    assert not paint(pipe, "one").equal(paint(pipe, "two"))


def test_it_merges_in_bf16(merge):
    training = {"steps": 2, "batch_size": 4, "precision": "bf16"}
    pipe = dmm.load_pipeline(merge("sdxl", "bf16", styles=ADAPTERS, training=training), torch_dtype=torch.bfloat16)
    assert not paint(pipe, "one").equal(paint(pipe, "two"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """What looks like SDXL and is none, as folders and single files, by name."""
    at, sdxl = tmp_path_factory.mktemp("strangers"), tiny_sdxl()
    TINY["sd2"]().save_pretrained(at / "sd2")
    save_single_file(TINY["sd2"](), at / "sd2.safetensors")
    parts = {name: sdxl.components[name] for name in ("text_encoder_2", "tokenizer_2", "unet", "vae", "scheduler")}
    StableDiffusionXLImg2ImgPipeline(text_encoder=None, tokenizer=None, **parts).save_pretrained(at / "refiner")
    save_single_file(sdxl, at / "whole.safetensors")
    tensors = load_file(at / "whole.safetensors")
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    kept = {name.replace(second, first): one for name, one in tensors.items() if not name.startswith(first)}
    save_file(kept, at / "refiner.safetensors")
    sdxl.save_pretrained(at / "sdxl")
    return at


@pytest.mark.parametrize("suffix", ["", ".safetensors"], ids=["folder", "file"])
@pytest.mark.parametrize(("stranger", "title"), [("sd2", r"SD 2\.x"), ("refiner", "the SDXL refiner")])
def test_what_is_no_sdxl_is_refused_by_name_before_anything_is_loaded(strangers, stranger, title, suffix, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)  # nothing gets that far
    teachers = [{"name": name, "model": model} for name, model in (("one", "sdxl"), ("two", stranger + suffix))]
    recipe = {"base": "sdxl", "teachers": teachers, "data": {"images": "."}, "size": 16}
    (strangers / "recipe.yaml").write_text(write_yaml(recipe))
    message = rf"teacher 'two': .*{stranger}{suffix} is {title} \(.*\); SDXL was expected\. Choose models of one family"
    with pytest.raises(UserError, match=message):
        check_merge(load_recipe(strangers / "recipe.yaml"), 1, torch.device("cpu"))
