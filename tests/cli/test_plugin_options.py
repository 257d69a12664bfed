import argparse

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image
from plugin_helpers import save_ip_adapter, save_lora, tiny_controlnet

import dmm.pipeline.sampling
from dmm.cli import main
from dmm.cli.plugin_options import add_plugin_options, check_plugins
from dmm.files.parameters import read_parameters


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("edges", "cat", "mask"):
        Image.effect_noise((16, 24), 90).convert("RGB").save(f"{name}.png")
    return tmp_path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


def test_generate_takes_them_all_with_styles_on(folder, merged, capsys):
    for i in range(2):
        tiny_controlnet(5 + i).save_pretrained(folder / f"net{i}")
    save_ip_adapter(folder / "ip")
    save_lora(folder / "lora.safetensors")
    given = {
        "plain": [],
        "lora": ["--lora", "lora.safetensors:0.8"],
        "control": ["--controlnet", "net0", "--control-image", "edges.png"],
        "controls": [
            *("--controlnet", "net0:0.8", "--control-image", "edges.png"),
            *("--controlnet", "net1:0.5", "--control-image", "cat.png"),
        ],
        "image": ["--image", "cat.png", "--strength", "0.5"],
        "mask": ["--image", "cat.png", "--mask", "mask.png"],
        "ip": ["--ip-adapter", "ip/ip-adapter.safetensors:0.6", "--ip-image", "cat.png"],
        "time": [],
    }
    common = ["--steps", "4", "--device", "cpu", "--seed", "3"]
    for name, options in given.items():
        style = "0-0.5:photo=0.5,clay=0.5;0.5-1:ink" if name == "time" else "ink"
        arguments = ["generate", str(merged), "a cat", "--style", style, "--output", f"painted/{name}.png"]
        assert main([*arguments, *options, *common]) == 0, capsys.readouterr().err
    painted = {name: pixels(folder / f"painted/{name}.png") for name in given}
    assert painted["image"].shape == (24, 16, 3)  # of the image it begins with
    for name in ("lora", "control", "controls", "ip", "time"):
        assert abs(painted[name] - painted["plain"]).max() > 2, name
    assert abs(painted["image"] - painted["mask"]).max() > 2
    told = read_parameters(folder / "painted/controls.png")
    assert told["ControlNet 1"] == "Model: net1, Weight: 0.5"
    told = read_parameters(folder / "painted/mask.png")
    assert (told["Denoising strength"], told["Mask"], told["Size"]) == ("0.75", "mask.png", "16x24")
    assert read_parameters(folder / "painted/ip.png")["IP Adapter"] == "Model: ip-adapter, Weight: 0.6"
    assert read_parameters(folder / "painted/time.png")["Style"] == "0-0.5:photo=0.5,clay=0.5;0.5-1:ink"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--controlnet", "net"], "Every --controlnet needs a --control-image: 1 and 0 were given"),
        (["--control-image", "cat.png"], "Every --controlnet needs a --control-image: 0 and 1"),
        (["--controlnet", "net", "--control-image", "cat.png"], "--controlnet net: no such folder"),
        (["--mask", "mask.png"], "--mask goes with --image"),
        (["--strength", "0.5"], "--strength goes with --image"),
        (["--image", "cat.png", "--strength", "0"], "above 0 and at most 1, not 0"),
        (["--image", "cat.png", "--strength", "0.01"], "0.01 of 25 steps leaves none"),
        (["--image", "dog.png"], "--image dog.png: no such file"),
        (["--ip-adapter", "a.safetensors"], "--ip-adapter goes with --ip-image"),
        (["--ip-image", "cat.png"], "--ip-image goes with --ip-adapter"),
        (["--ip-adapter", "a.safetensors", "--ip-image", "cat.png"], "--ip-adapter a.safetensors: no such file"),
    ],
)
def test_mistakes_are_told_before_anything_is_opened(folder, sd1_folder, capsys, options, message):
    assert main(["generate", str(sd1_folder), "a cat", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_nothing_asked_is_nothing_to_check():
    parser = argparse.ArgumentParser()
    add_plugin_options(parser)
    args = parser.parse_args([])
    args.steps = 25
    check_plugins(args)


def test_all_styles_of_a_prompt_are_one_pass_whatever_the_size(folder, merged, monkeypatch):
    monkeypatch.setattr(dmm.pipeline.sampling, "usual_batch_size", lambda width, height: 1)
    batches = []
    forward = UNet2DConditionModel.forward

    def count(unet, sample, *args, **kwargs):
        batches.append(len(sample))
        return forward(unet, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", count)
    arguments = ["generate", str(merged), "a cat", "--styles", "all", "--guidance", "1", "--output", "all.png"]
    assert main([*arguments, "--steps", "2", "--device", "cpu"]) == 0
    assert batches == [3, 3]
