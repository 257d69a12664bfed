import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import transformers
from conftest import STYLE_NAMES, tiny_pipeline
from peft import LoraConfig
from PIL import Image

import dmm.pipeline.sampling
from dmm.cli import COMMANDS, main
from dmm.families.sd1 import SD1
from dmm.files.parameters import lora_hash, model_hash, read_parameters
from dmm.files.pictures import GAP, MARGIN, SMALLEST_CELL
from dmm.formats.lora import save_kohya_lora


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
        "Model hash": model_hash(sd1_folder, "unet"),
        "Model": "folder",
    }
    assert pixels(tmp_path / "cat.png").shape == (16, 24, 3)
    said = capsys.readouterr()
    assert said.out.startswith("Wrote cat.png: a picture of 24 x 16 pixels")
    assert "pictures/s" in said.err
    assert "1/1" in said.err


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
    save_kohya_lora(lora, {"unet": pipeline.unet}, SD1)
    for name, option in (("without", []), ("none", [f"{lora}:0"]), ("half", [f"{lora}:0.5"]), ("whole", [lora])):
        assert generate("a cat", "--output", f"{name}.png", *(["--lora", *option] if option else [])) == 0
    without, none, half, whole = (pixels(tmp_path / f"{name}.png") for name in ("without", "none", "half", "whole"))
    assert (without == none).all()
    assert 0 < abs(half - without).mean() < abs(whole - without).mean()
    parameters = read_parameters(tmp_path / "half.png")
    assert parameters["Prompt"] == "a cat <lora:ink:0.5>"
    assert parameters["Lora hashes"] == f"ink: {lora_hash(lora)}"
    assert "Lora hashes" not in read_parameters(tmp_path / "without.png")
    assert generate("a cat", "--output", "twice.png", "--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5") == 0
    assert abs(pixels(tmp_path / "twice.png") - whole).max() <= 1
    assert read_parameters(tmp_path / "twice.png")["Prompt"] == "a cat <lora:ink:0.5> <lora:ink:0.5>"


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
    batch, count = dmm.pipeline.sampling._sample_batch, iter(range(9))

    def interrupted(*args, **kwargs):
        if next(count) == 2:
            raise KeyboardInterrupt
        return batch(*args, **kwargs)

    monkeypatch.setattr(dmm.pipeline.sampling, "_sample_batch", interrupted)
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
        (["a cat", "--device", "cuda:99"], "of 'cuda'; choose another, or cpu"),
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
    [
        ([], "Name a command: "),
        (["genrate"], "did you mean 'generate'"),
        (["--vers"], "'--version'"),
    ],
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


# merged models


@pytest.fixture
def paint(generate, merged):
    """``dmm generate`` on the tiny merged model."""
    return lambda *args: generate(*args, model=merged)


def cells(path, num_rows, num_columns):
    """The pictures of a grid of pictures of 16 x 16, (rows, columns, 16, 16, 3)."""
    whole = pixels(path)
    step, scale = SMALLEST_CELL + GAP, SMALLEST_CELL // 16
    top = len(whole) - MARGIN + GAP - num_rows * step  # labels are above and to the left
    left = whole.shape[1] - MARGIN + GAP - num_columns * step

    def cell(row, column):
        y, x = top + row * step, left + column * step
        return whole[y : y + SMALLEST_CELL : scale, x : x + SMALLEST_CELL : scale]

    return np.stack([[cell(row, column) for column in range(num_columns)] for row in range(num_rows)])


def test_a_style_changes_the_picture_and_is_told(paint, tmp_path, capsys):
    for name, style in (("ink", "ink"), ("one", "ink=1"), ("mix", "ink=0.7, photo=0.3")):
        assert paint("a cat", "--style", style, "--output", f"{name}.png") == 0
    assert "note" not in capsys.readouterr().err
    assert (pixels(tmp_path / "ink.png") == pixels(tmp_path / "one.png")).all()
    assert (pixels(tmp_path / "ink.png") != pixels(tmp_path / "mix.png")).any()
    assert read_parameters(tmp_path / "one.png")["Style"] == "ink"
    assert read_parameters(tmp_path / "mix.png")["Style"] == "ink=0.7,photo=0.3"


def test_without_a_style_a_merged_model_paints_as_its_stock_part_and_says_so(paint, tmp_path, capsys, generate):
    assert paint("a cat", "--output", "merged.png") == 0
    assert "dmm: note: without --style a merged model paints none of its styles: ink, photo, clay" in (
        capsys.readouterr().err
    )
    assert generate("a cat", "--output", "stock.png") == 0
    assert (pixels(tmp_path / "merged.png") == pixels(tmp_path / "stock.png")).all()
    assert "Style" not in read_parameters(tmp_path / "merged.png")


def test_all_styles_are_a_row_of_what_each_is_alone(paint, tmp_path):
    assert paint("a cat", "--styles", "all", "--output", "all.png") == 0
    assert paint("a cat", "--styles", "clay,ink", "--output", "two.png") == 0
    assert paint("a cat", "--style", "clay", "--style", "ink", "--output", "twice.png") == 0
    row = cells(tmp_path / "all.png", 1, 3)[0]
    for name, picture in zip(STYLE_NAMES, row, strict=True):
        assert paint("a cat", "--style", name, "--output", f"{name}.png") == 0
        assert abs(picture - pixels(tmp_path / f"{name}.png")).max() <= 1
    assert all(abs(row[i] - row[i - 1]).max() > 20 for i in range(3))
    assert abs(cells(tmp_path / "two.png", 1, 2)[0] - row[[2, 0]]).max() <= 1
    assert (pixels(tmp_path / "two.png") == pixels(tmp_path / "twice.png")).all()
    assert read_parameters(tmp_path / "all.png")["Style"] == "ink; photo; clay"


def test_each_picture_of_a_folder_tells_its_style(paint, tmp_path):
    assert (
        paint("a cat", "a dog", "--seed", "1,2", "--style", "ink", "--style", "ink=.5,clay=.5", "--output", "x/") == 0
    )
    paths = sorted((tmp_path / "x").iterdir())
    assert [path.name for path in paths[:2]] == ["0001-seed1-ink.png", "0001-seed1-ink=0.5,clay=0.5.png"]
    assert len(paths) == 8
    parameters = read_parameters(tmp_path / "x" / "0002-seed2-ink=0.5,clay=0.5.png")
    assert (parameters["Prompt"], parameters["Seed"], parameters["Style"]) == ("a dog", "2", "ink=0.5,clay=0.5")


def test_a_strip_goes_from_one_style_to_the_other_in_even_steps(paint, tmp_path):
    assert paint("a cat", "--strip", "ink,photo", "--output", "strip.png") == 0
    assert paint("a cat", "--strip", "photo,ink", "--count", 3, "--seed", "0,4", "--output", "x/") == 0
    told = read_parameters(tmp_path / "strip.png")["Style"].split("; ")
    assert (told[0], told[3], told[10], len(told)) == ("ink", "ink=0.7,photo=0.3", "photo", 11)
    strip = cells(tmp_path / "strip.png", 1, 11)[0]
    for i, name in ((0, "photo"), (5, "photo=0.5,ink=0.5"), (10, "ink")):
        assert abs(strip[10 - i] - pixels(tmp_path / "x" / f"0001-seed0-{name}.png")).max() <= 1
    assert len(list((tmp_path / "x").iterdir())) == 6


def test_pairs_are_a_square_with_the_styles_on_its_diagonal(paint, tmp_path, capsys):
    assert paint("a cat", "--pairs", "--output", "pairs.png") == 0
    assert "6 pictures" in capsys.readouterr().out
    assert paint("a cat", "--pairs", "--output", "x/") == 0
    square = cells(tmp_path / "pairs.png", 3, 3)
    assert (square == square.swapaxes(0, 1)).all()
    for i, one in enumerate(STYLE_NAMES):
        assert abs(square[i, i] - pixels(tmp_path / "x" / f"0001-seed0-{one}.png")).max() <= 1
        for j, other in enumerate(STYLE_NAMES[:i]):
            path = tmp_path / "x" / f"0001-seed0-{other}=0.5,{one}=0.5.png"
            assert abs(square[i, j] - pixels(path)).max() <= 1
    assert len(list((tmp_path / "x").iterdir())) == 6


def test_free_names_tell_the_styles(paint, tmp_path):
    for options in (["--style", "ink=.7,photo=.3"], ["--styles", "ink,clay"], ["--strip", "ink,clay", "--count", 2]):
        assert paint("A cat!", *options) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("a-cat-seed0-ink-0-7-photo-0-3.png", "a-cat-seed0-styles.png", "a-cat-seed0-ink-to-clay.png")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--style", "fhoto"], "no style 'fhoto'; did you mean 'photo'"),
        (["--style", "ink=0.7,photo=0.7"], "must sum to 1; these (ink=0.7, photo=0.7) sum to 1.4"),
        (["--style", "ink,photo"], "must sum to 1; these (ink=1, photo=1) sum to 2"),
        (["--style", "ink=much"], "'ink=much' is no style; write a name, or a mix as in a=0.7,b=0.3"),
        (["--style", "ink=0.5,ink=0.5"], "names 'ink' twice"),
        (["--style", "ink", "--style", "ink"], "'ink' is asked for twice"),
        (["--styles", "ink,,clay"], "'ink,,clay' is no list of styles"),
        (["--styles", "ink,clai"], "did you mean 'clay'"),
        (["--strip", "ink"], "'ink' is not two styles"),
        (["--strip", "ink,ink"], "'ink,ink' is not two styles"),
        (["--strip", "ink,clay", "--count", "1"], "--count from 2"),
        (["--style", "ink", "--pairs"], "not allowed with argument"),
        (["--pairs", "--seed", "0-3", "--output", "x.png"], "one prompt and one seed"),
    ],
)
def test_wrong_styles_are_one_line_and_status_2(paint, tmp_path, capsys, options, message):
    assert paint("a cat", *options) == 2
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--style", "ink"], ["--styles", "all"], ["--strip", "a,b"], ["--pairs"]])
def test_a_stock_model_has_no_styles(generate, capsys, options):
    assert generate("a cat", *options) == 2
    assert "stock model without styles" in error_of(capsys)


def test_damaged_styles_are_one_line_and_status_2(tmp_path, merged, capsys):
    (tmp_path / "styles").mkdir()
    (tmp_path / "styles" / "config.json").write_text(json.dumps({"_class_name": "Other"}))
    assert main(["generate", str(tmp_path), "a cat", "--style", "ink"]) == 2
    assert "describes a Other" in error_of(capsys)
