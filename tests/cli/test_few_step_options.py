"""A few-step model, or LoRA, is painted with as it says, unless the user says otherwise; those of others work too."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from dmm.cli import main
from dmm.families.sd1 import SD1
from dmm.files.few_steps import FILE, KEY, FewSteps
from dmm.files.parameters import read_parameters
from dmm.formats.lora import save_kohya_lora

# what LCM-LoRA changes
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TARGETS += ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]


@pytest.fixture
def paint(tmp_path, capsys):
    """``dmm generate`` of one picture; its pixels, what it says of itself, and what was noted."""

    def run(model, *options):
        capsys.readouterr()
        output = tmp_path / "cat.png"
        args = [str(model), "a cat", "--device", "cpu", "--output", str(output), "--overwrite", *map(str, options)]
        assert main(["generate", *args]) == 0
        notes = [line for line in capsys.readouterr().err.splitlines() if "few steps" in line]
        with Image.open(output) as image:
            return np.asarray(image, dtype=int), read_parameters(output), notes

    return run


@pytest.fixture(scope="module")
def fast(merged, tmp_path_factory):
    """A merged model that says that it paints in few steps."""
    folder = tmp_path_factory.mktemp("fast") / "fast"
    shutil.copytree(merged, folder)
    (folder / FILE).write_text(FewSteps("splam", (7.0, 7.0), 20).written())
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """One LoRA with the layers of LCM-LoRA, in kohya's layout and in that of diffusers."""
    folder = tmp_path_factory.mktemp("loras")
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=TARGETS))
    save_kohya_lora(folder / "kohya.safetensors", {"unet": pipe.unet}, SD1)
    StableDiffusionPipeline.save_lora_weights(folder / "diffusers", get_peft_model_state_dict(pipe.unet))
    return {"kohya": folder / "kohya.safetensors", "diffusers": folder / "diffusers"}


def test_a_few_step_model_is_painted_with_as_it_says_and_that_is_told(fast, paint):
    _, told, notes = paint(fast, "--style", "ink")
    assert (told["Steps"], told["Sampler"], told["CFG scale"]) == ("4", "LCM", "1")
    assert notes == [f"dmm: note: {fast} paints in few steps (splam): 4 steps, sampler LCM, guidance 1"]


def test_what_the_user_says_stays(fast, paint):
    _, told, notes = paint(fast, "--style", "ink", "--steps", 2, "--guidance", 1.5, "--sampler", "TCD")
    assert (told["Steps"], told["Sampler"], told["CFG scale"]) == ("2", "TCD", "1.5")
    assert notes == []


def test_a_stock_models_scheduler_says_so_and_any_other_model_is_painted_with_as_ever(sd1_folder, tmp_path, paint):
    folder = tmp_path / "lcm"
    shutil.copytree(sd1_folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "LCMScheduler"}))
    _, told, notes = paint(folder)
    assert (told["Steps"], told["Sampler"], told["CFG scale"]) == ("4", "LCM", "1")
    assert notes == [f"dmm: note: {folder} paints in few steps: 4 steps, sampler LCM, guidance 1"]
    _, told, notes = paint(sd1_folder, "--steps", 2)
    assert (told["Steps"], told["Sampler"], told["CFG scale"]) == ("2", "DPM++ 2M", "7")
    assert notes == []


def test_what_is_exported_says_so_too(fast, tmp_path, paint):
    shutil.copytree(fast, tmp_path / "lcm")
    config = tmp_path / "lcm" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "LCMScheduler"}))
    for output in (tmp_path / "ink", tmp_path / "ink.safetensors"):
        assert main(["export", str(tmp_path / "lcm"), "--style", "ink", "--output", str(output)]) == 0
        picture, told, notes = paint(output)
        assert (told["Steps"], told["Sampler"], told["CFG scale"]) == ("4", "LCM", "1")
        assert len(notes) == 1
        assert abs(picture - paint(tmp_path / "lcm", "--style", "ink")[0]).max() <= 1


def test_a_lora_of_ours_says_so_in_its_header(merged, loras, tmp_path, paint):
    lora = tmp_path / "fast.safetensors"
    save_file(load_file(loras["kohya"]), lora, {KEY: FewSteps("lcm", (7.0, 7.0), 20, 2).written()})
    _, told, notes = paint(merged, "--style", "ink", "--lora", lora)
    assert (told["Steps"], told["Sampler"], told["CFG scale"]) == ("4", "LCM", "1")
    assert notes == [f"dmm: note: {lora} paints in few steps (lcm): 4 steps, sampler LCM, guidance 1"]


def test_guidance_that_a_model_is_told_is_in_the_middle_of_what_it_was_trained_with(merged, tmp_path, paint):
    folder = tmp_path / "told"
    shutil.copytree(merged, folder)
    (folder / FILE).write_text(FewSteps("lcm", (3.0, 12.0), 20).written())
    _, told, notes = paint(folder, "--style", "ink", "--steps", 2)
    assert told["CFG scale"] == "7.5"
    assert notes[0].endswith("paints in few steps (lcm): sampler LCM, guidance 7.5, which it is told")


def test_a_negative_prompt_has_no_effect_on_what_needs_no_guidance(fast, capsys):
    assert main(["generate", str(fast), "a cat", "--style", "ink", "--negative", "a dog"]) == 2
    assert "A negative prompt has no effect at a guidance scale of 1" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["merged", "merged_adapters"])
def test_few_step_loras_of_others_work_in_every_style(model, loras, paint, request):
    folder = request.getfixturevalue(model)
    settings = ("--steps", 3, "--sampler", "LCM", "--guidance", 1)
    for style in ("ink", "photo=0.5,clay=0.5"):
        without = paint(folder, "--style", style, *settings)[0]
        by_layout = [paint(folder, "--style", style, "--lora", file, *settings)[0] for file in loras.values()]
        assert abs(by_layout[0] - by_layout[1]).max() <= 1
        assert (by_layout[0] != without).any()


def test_a_few_step_lora_of_others_paints_as_diffusers_has_it(sd1_folder, loras, paint):
    ours, _, _ = paint(sd1_folder, "--lora", loras["kohya"], "--steps", 4, "--sampler", "LCM", "--guidance", 1)
    pipe = StableDiffusionPipeline.from_pretrained(sd1_folder)
    pipe.load_lora_weights(loras["diffusers"])
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    theirs = pipe("a cat", num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0]
    assert abs(ours - np.asarray(theirs, dtype=int)).max() <= 1
