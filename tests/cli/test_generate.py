import subprocess
import sys

import diffusers
import numpy as np
import pytest
import transformers
from conftest import tiny_pipeline
from peft import LoraConfig
from PIL import Image

import dmm.sampling
from dmm.cli import COMMANDS, main
from dmm.formats.lora import save_kohya_lora
from dmm.parameters import model_hash, read_parameters


@pytest.fixture(autouse=True)
def libraries_as_they_were():
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    verbosities = [logging.get_verbosity() for logging in loggings]
    yield
    for logging, verbosity in zip(loggings, verbosities, strict=True):
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


@pytest.fixture
def generate(sd1_folder, tmp_path, monkeypatch):
    """``dmm generate`` in two steps on the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args, model=sd1_folder: main(
        ["generate", str(model), *map(str, args), "--steps", "2", "--device", "cpu"]
    )


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


def error_of(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dmm: error: ")
    return lines[0]


def test_one_picture_says_what_it_was_made_from(generate, tmp_path, sd1_folder, capsys):
    assert generate("a cat", "--seed", 3, "--output", "cat.png", "--negative", "blurry", "--width", 24) == 0
    assert read_parameters(tmp_path / "cat.png") == {
        "Prompt": "a cat",
        "Negative prompt": "blurry",
        "Steps": "2",
        "Sampler": "DPM++ 2M",
        "CFG scale": "7",
        "Seed": "3",
        "Size": "24x16",
        "Model hash": model_hash(sd1_folder),
        "Model": "folder",
    }
    assert pixels(tmp_path / "cat.png").shape == (16, 24, 3)
    said = capsys.readouterr()
    assert said.out.startswith("Wrote cat.png: a picture of 24 x 16 pixels")
    assert "pictures/s" in said.err
    assert "1.0/1" in said.err


def test_a_folder_gets_one_file_each_the_same_as_alone(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("a house\n")
    assert generate("a cat", "--prompts", "prompts.txt", "--seed", "4-6", "--output", "out", "--batch-size", 4) == 0
    names = [f"{prompt:04d}-seed{seed}.png" for prompt in (1, 2) for seed in (4, 5, 6)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert read_parameters(tmp_path / "out" / names[5])["Prompt"] == "a house"
    assert read_parameters(tmp_path / "out" / names[5])["Seed"] == "6"
    assert generate("a house", "--seed", 6, "--output", "alone.png") == 0
    assert abs(pixels(tmp_path / "alone.png") - pixels(tmp_path / "out" / names[5])).max() <= 1


def test_several_pictures_make_a_grid_and_a_free_name_is_found(generate, tmp_path):
    for _ in range(2):
        assert generate("A cat, sitting!", "a house", "--count", 3) == 0
    names = ["a-cat-sitting-and-1-more-seed0-2-1.png", "a-cat-sitting-and-1-more-seed0-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    height, width, _ = pixels(tmp_path / names[0]).shape
    assert width > 3 * 128
    assert 2 * 128 < height < 3 * 128
    parameters = read_parameters(tmp_path / names[0])
    assert (parameters["Prompt"], parameters["Seed"]) == ("A cat, sitting!\na house", "0-2")


def test_one_prompts_many_seeds_are_wrapped(generate, tmp_path):
    assert generate("a cat", "--seed", "0-9", "--output", "cats.png") == 0
    height, width, _ = pixels(tmp_path / "cats.png").shape
    assert width > 8 * 128
    assert 2 * 128 < height < 3 * 128


def test_a_single_file_paints_as_the_folder_it_came_from(generate, tmp_path, sd1_file, sd1_folder):
    assert generate("a cat", "--output", "folder.png") == 0
    assert generate("a cat", "--output", "file.png", "--config", sd1_folder, model=sd1_file) == 0
    assert (pixels(tmp_path / "folder.png") == pixels(tmp_path / "file.png")).all()
    assert read_parameters(tmp_path / "file.png")["Model"] == "model"


def test_a_lora_acts_by_its_scale_and_is_told(generate, tmp_path, pipeline):
    lora = tmp_path / "ink.safetensors"
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    save_kohya_lora(lora, unet=pipeline.unet)
    for name, option in (("without", []), ("none", [f"{lora}:0"]), ("half", [f"{lora}:0.5"]), ("whole", [lora])):
        assert generate("a cat", "--output", f"{name}.png", *(["--lora", *option] if option else [])) == 0
    without, none, half, whole = (pixels(tmp_path / f"{name}.png") for name in ("without", "none", "half", "whole"))
    assert (without == none).all()
    assert 0 < abs(half - without).mean() < abs(whole - without).mean()
    parameters = read_parameters(tmp_path / "half.png")
    assert (parameters["LoRA"], parameters["LoRA scale"]) == ("ink", "0.5")
    assert len(parameters["LoRA hash"]) == 10
    assert "LoRA" not in read_parameters(tmp_path / "without.png")


def test_a_v_prediction_model_paints_as_one(generate, tmp_path):
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    assert generate("a cat", "--output", "v.png", model=tmp_path / "v") == 0
    assert generate("a cat", "--output", "told.png", "--prediction-type", "v_prediction") == 0
    assert generate("a cat", "--output", "epsilon.png") == 0
    assert (pixels(tmp_path / "v.png") == pixels(tmp_path / "told.png")).all()
    assert (pixels(tmp_path / "v.png") != pixels(tmp_path / "epsilon.png")).any()


def test_an_output_that_exists_is_refused_untouched_until_overwrite(generate, tmp_path, capsys):
    (tmp_path / "cat.png").write_text("mine")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "0001-seed0.png").write_text("mine")
    for output in ("cat.png", "cats/"):
        assert generate("a cat", "--output", output) == 2
        assert "--overwrite" in error_of(capsys)
    assert (tmp_path / "cat.png").read_text() == (tmp_path / "cats" / "0001-seed0.png").read_text() == "mine"
    for output in ("cat.png", "cats/"):
        assert generate("a cat", "--output", output, "--overwrite") == 0
    assert (pixels(tmp_path / "cat.png") == pixels(tmp_path / "cats" / "0001-seed0.png")).all()


@pytest.mark.parametrize("output", ["cats.png", "cats/"])
def test_an_interrupted_run_leaves_nothing(generate, tmp_path, monkeypatch, capsys, output):
    batch, count = dmm.sampling._sample_batch, iter(range(9))

    def interrupted(*args, **kwargs):
        if next(count) == 2:
            raise KeyboardInterrupt
        return batch(*args, **kwargs)

    monkeypatch.setattr(dmm.sampling, "_sample_batch", interrupted)
    assert generate("a cat", "--count", 4, "--batch-size", 1, "--output", output) == 130
    assert capsys.readouterr().err.endswith("\ndmm: interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a cat", "--step", "3"], "no option '--step'; did you mean '--steps'"),
        (["a cat", "--guidance-scale=3"], "no option '--guidance-scale'; did you mean '--guidance'"),
        (["a cat", "--sampler", "euler b"], "no sampler 'euler b'; did you mean 'Euler a'"),
        (["a cat", "--seed", "7-3"], "'7-3' is no seed; write 3, 0-7, 1,2,5 or 0-3,8"),
        (["a cat", "--seed", "1,2", "--count", "2"], "--count counts up from one seed"),
        (["a cat", "--count", "0"], "--count must be from 1"),
        (["a cat", "--width", "many"], "--width: invalid int value: 'many'"),
        (["a cat", "--width", "500"], "multiple of 8 pixels, not 500; 496 and 504 are the nearest"),
        (["a cat", "--guidance", "0"], "guidance scale must be at least 1"),
        (["a cat", "--output", "cat.jpg"], "written as PNG"),
        (["a cat", "--device", "gpu"], "no device 'gpu'"),
        (["a cat", "--device", "cuda:99"], "torch finds"),
        (["a cat", "--config", "nowhere"], "--config nowhere: no such folder"),
        (["a cat", "--lora", "nowhere.safetensors:0.5"], "--lora nowhere.safetensors: no such file"),
        ([], "There is no prompt"),
        (["--prompts", "none.txt"], "'none.txt' could not be read"),
        (["a cat", "a dog", "--seed", "0-99", "--width", "512", "--output", "big.png"], "too large to look at"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(sd1_folder, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(sd1_folder), *args]) == 2
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


def test_bad_models_are_one_line_and_status_2(generate, tmp_path, sd1_file, capsys):
    assert generate("a cat", model="nowhere.safetensors") == 2
    assert "no such file or folder" in error_of(capsys)
    assert generate("a cat", model=sd1_file) == 2
    assert "config" in error_of(capsys)
    (tmp_path / "cut.safetensors").write_bytes(sd1_file.read_bytes()[:5000])
    assert generate("a cat", "--config", tmp_path, model="cut.safetensors") == 2
    assert "cut.safetensors" in error_of(capsys)


def test_a_prompt_that_is_not_read_to_its_end_is_told(generate, capsys):
    assert generate("x" * 30, "--output", "x.png") == 0
    assert "dmm: note: the model does not read the end of" in capsys.readouterr().err


def test_options_may_stand_between_model_and_prompt(sd1_folder, tmp_path):
    output = tmp_path / "cat.png"
    args = ["--steps", "1", str(sd1_folder), "--device", "cpu", "a cat", "--output", str(output), "a dog"]
    assert main(["generate", *args]) == 0
    assert read_parameters(output)["Prompt"] == "a cat\na dog"


def test_a_prompt_may_begin_with_a_dash_after_two(sd1_folder, tmp_path):
    output = tmp_path / "cat.png"
    args = [str(sd1_folder), "--steps", "1", "--device", "cpu", "--output", str(output), "--", "-cat"]
    assert main(["generate", *args]) == 0
    assert read_parameters(output)["Prompt"] == "-cat"


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "Name a command: demo, generate"), (["genrate"], "did you mean 'generate'"), (["--vers"], "'--version'")],
)
def test_an_unknown_command_is_told_with_the_nearest(capsys, argv, message):
    assert main(argv) == 2
    assert message in error_of(capsys)


def test_help_and_mistakes_are_told_without_loading_anything_heavy(tmp_path):
    script = (
        "import sys, dmm.cli\n"
        "statuses = [dmm.cli.main(args) for args in (['--help'], ['--version'], ['generate', 'nowhere', 'a cat'])]\n"
        "assert statuses == [0, 0, 2], statuses\n"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  dmm {command} " in capsys.readouterr().out
