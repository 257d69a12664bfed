"""A recipe becomes a model, whole or not at all; what is wrong is one sentence, before anything is written."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline, tiny_text_encoder, tiny_unet, tiny_vae
from diffusers import DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from helpers import die, in_child, same_weights
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save

import dmm
from dmm.cli import main
from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.files.digest import sha256
from dmm.files.parameters import read_parameters
from dmm.files.pictures import GAP, MARGIN
from dmm.files.yaml import write_yaml
from dmm.formats.lora import save_kohya_lora
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.sampling import sample
from dmm.recipes.recipe import load_recipe
from dmm.training.preview import find_preview, open_preview
from dmm.training.trainer import Trainer

UNET = "unet/diffusion_pytorch_model.safetensors"
STYLES = "styles/diffusion_pytorch_model.safetensors"
NAMES = ["folder", "lora", "velocity"]


@pytest.fixture(scope="module")
def models(sd1_folder, tmp_path_factory):
    """A base, and teachers of every form."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline(1).save_pretrained(folder / "teacher")
    adapted = tiny_pipeline()
    torch.manual_seed(3)
    adapted.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "conv1"]))
    save_kohya_lora(folder / "lora.safetensors", {"unet": adapted.unet}, SD1)
    save_single_file(tiny_pipeline(2, "v_prediction"), folder / "velocity.safetensors")
    torch.manual_seed(4)
    tiny_vae().save_pretrained(folder / "vae")
    shutil.copytree(sd1_folder, folder / "base")
    images = folder / "images"
    images.mkdir()
    lines = []
    for index, caption in enumerate(["a cat", "a dog", "a house", ""]):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    (images / "metadata.jsonl").write_text("".join(lines))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    return folder


def recipe_of(models, **changes):
    return {
        "base": "base",
        "teachers": [
            {"name": "folder", "model": "teacher", "clip_skip": 1},
            {"name": "lora", "lora": "lora.safetensors", "lora_scale": 0.5},
            {"name": "velocity", "model": "velocity.safetensors"},
        ],
        "data": {"images": "images"},
        "size": 16,
        "styles": {"rank": 0},
        "training": {
            "steps": 4,
            "batch_size": 6,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "ema_decay": 0.5,
        },
        "losses": {"feature": 0.1},
        "checkpoint": {"every": 2, "keep": 2},
        "logging": {"every": 1, "sample_every": 2, "sample_steps": 2},
        "seed": 7,
        **changes,
    }


@pytest.fixture(scope="module")
def merge(models, tmp_path_factory):
    """``dmm merge`` of a recipe with changes, in this process, on one thread; returns its exit status."""
    cache = tmp_path_factory.mktemp("cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))

        def run(output, *options, **changes):
            path = models / f"{output.name}.yaml"
            path.write_text(write_yaml(recipe_of(models, **changes)))
            try:
                return main(["merge", str(path), "--output", str(output), *options])
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)

        yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(merge, tmp_path_factory):
    """A merge that ran to its end."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert merge(folder) == 0
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder):
    return [entry["step"] for entry in log_of(folder)]


def result_of(folder):
    return {name: (folder / name).read_bytes() for name in (UNET, STYLES, "model_index.json", "styles/styles.json")}


def test_the_result_is_a_stock_pipeline_with_styles(finished, models):
    stock = DiffusionPipeline.from_pretrained(finished)
    assert type(stock) is StableDiffusionPipeline
    pipe = dmm.load_pipeline(finished)
    assert dmm.style_names(pipe) == NAMES
    base = open_pipeline(ModelSource(models / "base"))
    for part in ("vae", "text_encoder"):
        theirs = getattr(base, part).state_dict()
        assert all(tensor.equal(theirs[name]) for name, tensor in getattr(pipe, part).state_dict().items())
    assert pipe.unet.config.block_out_channels == base.unet.config.block_out_channels
    assert pipe.scheduler.config.prediction_type == "epsilon"
    styled = [np.asarray(one) for one in sample(pipe, ["a cat"] * 3, [0] * 3, styles=NAMES, steps=2)]
    assert not np.array_equal(styled[0], styled[1])


def test_the_run_tells_of_itself(finished, models):
    run, result = {"recipe.yaml", "log.jsonl", "checkpoints", "samples"}, {"model_index.json", "styles"}
    parts = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert {path.name for path in finished.iterdir()} == run | result | parts
    assert steps_of(finished) == [1, 2, 3, 4]
    names = ["step-00000002.png", "step-00000004.png"]
    assert sorted(path.name for path in (finished / "samples").iterdir()) == names
    assert len(list((finished / "checkpoints").iterdir())) == 2
    told = json.loads((finished / "styles/styles.json").read_text())["styles"]
    assert [one["name"] for one in told] == NAMES
    assert told[0]["source"] == str(models / "teacher")
    assert told[0]["sha256"] == sha256(models / "teacher" / UNET)
    assert told[1]["source"] == f"{models / 'lora.safetensors'} at 0.5 on {models / 'base'}"
    assert told[1]["sha256"] == sha256(models / "lora.safetensors")
    assert [one["prediction_type"] for one in told] == ["epsilon", "epsilon", "v_prediction"]


def test_samples_hold_the_teachers_above_the_student(finished, models):
    result = dmm.load_pipeline(finished)
    # the teacher that has the student's VAE, which shows all of them
    teacher = open_pipeline(ModelSource(models / "base", loras=((models / "lora.safetensors", 0.5),)))
    settings = {"steps": 2, "guidance_scale": 7.0, "width": 16, "height": 16}
    with Image.open(finished / "samples" / "step-00000004.png") as picture:
        cells = np.asarray(picture, dtype=int)
    side, prompts = 8 * 16, ["a cat", "a dog", "a house", ""]
    left, top = cells.shape[1] - MARGIN - 2 * side - GAP, cells.shape[0] - MARGIN - 8 * side - 7 * GAP
    for seed, prompt in enumerate(prompts):
        for row, pictures in enumerate(
            (
                sample(teacher, [prompt], [seed], **settings),
                sample(result, [prompt], [seed], styles=["lora"], **settings),
            )
        ):
            y = top + (2 * seed + row) * (side + GAP)
            shown = cells[y : y + side : 8, left : left + side : 8]
            assert abs(shown - np.asarray(next(pictures), dtype=int)).max() <= 2  # they are cached in float16


def test_the_result_holds_the_average_of_the_students_weights(finished):
    (*_, last) = sorted((finished / "checkpoints").iterdir())
    averaged, student = load_file(last / "ema.safetensors"), load_file(last / "student.safetensors")
    written = load_file(finished / UNET)
    assert all(tensor.equal(averaged[f"unet.{name}"]) for name, tensor in written.items())
    assert not all(tensor.equal(student[f"unet.{name}"]) for name, tensor in written.items())


def test_a_finished_run_is_left_alone(finished, merge, capsys):
    before = result_of(finished)
    assert merge(finished, "--resume") == 0
    told = f"{finished} is finished already: a stock diffusers pipeline, with the styles {', '.join(NAMES)}.\n"
    assert capsys.readouterr().out.endswith(told)
    assert merge(finished) == 2
    assert f"'{finished}' holds a merge. Name another output, or add --overwrite" in capsys.readouterr().err
    assert result_of(finished) == before


@pytest.mark.parametrize("moment", ["a step", "a save", "the result"])
def test_a_killed_run_goes_on_to_the_same_end(finished, merge, tmp_path, monkeypatch, moment):
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        if moment == "a step":
            step = Trainer._step
            patch.setattr(Trainer, "_step", lambda self, number: die() if number == 3 else step(self, number))
        elif moment == "a save":
            patch.setattr("dmm.training.checkpoint._put_in_place", die)
        else:
            rename = type(folder).rename
            patch.setattr(type(folder), "rename", lambda self, to: die() if to == folder / "unet" else rename(self, to))
        assert in_child(lambda: merge(folder)) == signal.SIGKILL
    assert not (folder / "model_index.json").exists()
    assert merge(folder, "--resume") == 0
    assert result_of(folder) == result_of(finished)
    assert steps_of(folder) == [1, 2, 3, 4]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in finished.iterdir())


def test_a_stopped_run_is_saved_and_says_how_to_go_on(finished, merge, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "stopped"
    step = Trainer._step
    with monkeypatch.context() as patch:

        def stop(self, number):
            step(self, number)
            if number == 0:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(Trainer, "_step", stop)
        assert merge(folder) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"dmm: interrupted: step 1 of 4 is saved in '{folder}'; --resume goes on"
    assert merge(folder) == 2
    assert (
        f"'{folder}' holds a merge that has not ended: step 1 of 4 is saved. --resume goes on with it, --overwrite "
        "begins anew; or name another output." in capsys.readouterr().err
    )
    go_on = f"step 1 of 4 is saved. Go on with `dmm merge {folder / 'recipe.yaml'} --output {folder} --resume`; `dmm "
    soup = tmp_path / "soup.yaml"
    soup.write_text(f"method: soup\nteachers: [{{name: a, model: {folder}}}, {{name: b, model: {folder}}}]\n")
    for command in (
        ["generate", str(folder), "a cat", "--style", "lora"],
        ["remove", str(folder), "lora", "--output", str(tmp_path / "removed")],
        ["export", str(folder), "--style", "lora", "--output", str(tmp_path / "lora.safetensors")],
        ["soup", str(soup), "--output", str(tmp_path / "soup.safetensors")],
    ):
        assert main(command) == 2
        assert f"{folder} is a merge that has not ended: {go_on}" in capsys.readouterr().err
    preview = [
        "generate",
        str(folder),
        "a cat",
        "--from-checkpoint",
        "--steps",
        "2",
        "--output",
        str(tmp_path / "p.png"),
    ]
    assert main([*preview, "--style", "velocity"]) == 0
    assert read_parameters(tmp_path / "p.png")["Model"] == "stopped step-00000001"
    assert main([*preview, "--style", "noto", "--overwrite"]) == 2
    assert "no style 'noto'" in capsys.readouterr().err
    assert merge(folder, "--resume") == 0
    told = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert told[0] == "3 styles (folder, lora, velocity) merged on the CPU with 1 thread, in fp32."
    assert told[1] == "training:    4 steps of 6 samples, 24 in all, 8 of each style; learning rate 0.001"
    assert told[2] == "data:        4 pictures with captions, brought to 16 x 16 pixels"
    assert told[8] == "goes on:     from step 1 of 4"
    assert result_of(folder) == result_of(finished)


def test_a_preview_is_what_the_result_would_be(finished):
    preview = find_preview(finished)
    assert (preview.styles, preview.checkpoint.name) == (NAMES, "step-00000004")
    pipe, result = open_preview(preview), dmm.load_pipeline(finished)
    assert same_weights(pipe, result)
    painted = [
        [np.asarray(picture) for picture in sample(one, ["a cat"] * 3, [0] * 3, styles=NAMES, steps=2)]
        for one in (pipe, result)
    ]
    assert np.array_equal(*painted)
    with pytest.raises(UserError, match="is not the folder of a merge"):
        find_preview(finished / "unet")


def test_a_run_goes_on_for_more_steps_but_not_as_another_one(finished, merge, tmp_path, capsys):
    folder = tmp_path / "more"
    shutil.copytree(finished, folder)
    assert merge(folder, "--resume", "--set", "seed=8") == 2
    assert "began with seed 7, the recipe now says 8" in capsys.readouterr().err
    assert merge(folder, "--resume", "--set", "teachers.1.lora_scale=1.0") == 2
    assert "began with teachers.1.lora_scale 0.5" in capsys.readouterr().err
    assert merge(folder, "--resume", "--set", "training.steps=3") == 2
    assert "has trained 4 steps already" in capsys.readouterr().err
    assert merge(folder, "--resume", "--set", "training.steps=5") == 0
    assert steps_of(folder) == [1, 2, 3, 4, 5]
    assert result_of(folder)[UNET] != result_of(finished)[UNET]


def everything_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resave(checkpoint, **changes):
    """Change files of a checkpoint, and its manifest with them."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, content in changes.items():
        file = next(file for file in manifest["files"] if file.startswith(name))
        (checkpoint / file).write_bytes(content)
        manifest["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def lose_checkpoints(folder):
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()


def damage_checkpoints(folder):
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.write_text('{"step": "four", "files": ["../../recipe.yaml"]}')


def spoil_student(folder):
    (newest,) = folder.glob("checkpoints/step-00000004")
    student = load_file(newest / "student.safetensors")
    student["style_prompts.embeddings"][0, 0] = math.nan
    resave(newest, student=save(student))


def empty_info(folder):
    resave(folder / "checkpoints" / "step-00000004", info=b'{"num_threads": []}')


def nest_info(folder):
    resave(folder / "checkpoints" / "step-00000004", info=b'{"a":' * 100_000)


def garble_log(folder):
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "note": "\xff"}\n')


def strange_log(folder):
    with (folder / "log.jsonl").open("a") as file:
        file.write("[5]\n")


@pytest.mark.parametrize(
    ("change", "steps", "message"),
    [
        (None, 3, "has trained 4 steps already, more than the recipe's training.steps of 3"),
        (lose_checkpoints, 3, "holds the result of a run whose checkpoints are gone"),
        (lose_checkpoints, 5, "begin a new run with --set 'start="),
        (damage_checkpoints, 5, "holds the result of a run whose checkpoints are gone"),
        (spoil_student, 5, "1 of the "),
        (empty_info, 5, "is whole, but none of this run"),
        (nest_info, 5, "nested more than 100 levels deep"),
        (garble_log, 5, "is not UTF-8 text"),
        (strange_log, 5, "line 5: this is no line of a run's log"),
    ],
)
def test_a_refused_resume_takes_nothing_away(finished, merge, tmp_path, capsys, change, steps, message):
    folder = tmp_path / "kept"
    shutil.copytree(finished, folder)
    if change:
        change(folder)
    before = everything_in(folder)
    assert merge(folder, "--resume", "--set", f"training.steps={steps}") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert everything_in(folder) == before


def test_a_result_without_checkpoints_is_trained_on_where_words_say_so(finished, merge, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(finished, start, ignore=shutil.ignore_patterns("checkpoints"))
    assert merge(tmp_path / "more", "--set", f"start={start}", "--set", "training.steps=1") == 0
    assert result_of(tmp_path / "more")["styles/styles.json"] == result_of(finished)["styles/styles.json"]


def test_two_merges_into_one_folder_are_one(merge, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "shared"
    step, told = Trainer._step, []

    def another_one(self, number):
        if number == 0:
            for options in ((), ("--resume",), ("--overwrite",)):
                assert main(["merge", str(folder / "recipe.yaml"), "--output", str(folder), *options]) == 2
                told.append(capsys.readouterr().err.splitlines()[-1])
        step(self, number)

    monkeypatch.setattr(Trainer, "_step", another_one)
    assert merge(folder, "--set", "training.steps=1") == 0
    assert len(told) == 3
    assert all(f"'{folder}' is being written by another process (process {os.getpid()} on" in one for one in told)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_run_goes_on_where_it_and_all_that_it_names_have_moved_to(models, merge, tmp_path, capsys, caplog):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(models, here)
    (here / "recipe.yaml").write_text(write_yaml(recipe_of(models)))
    command = ["--output", "merged", "--resume"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert main(["merge", "recipe.yaml", *command, "--set", "training.steps=2"]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        shutil.move(here, there)
        patch.chdir(there)
        assert main(["merge", "recipe.yaml", *command, "--set", "teachers.0.model=velocity.safetensors"]) == 2
        assert f"began with teachers.0.model {here / 'teacher'}" in capsys.readouterr().err
        assert main(["merge", "recipe.yaml", *command]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    assert f"base: '{here / 'base'}' is gone; '{there / 'base'}' is taken for the same." in caplog.text
    assert steps_of(there / "merged") == [1, 2, 3, 4]
    assert load_recipe(there / "merged" / "recipe.yaml").base == str(there / "base")


def test_overwrite_begins_anew_and_leaves_what_is_not_ours(finished, merge, tmp_path, capsys):
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints" / "stray").write_text("")
    assert merge(folder, "--overwrite") == 0
    assert result_of(folder) == result_of(finished)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "checkpoints" / "stray").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert merge(tmp_path / "other", "--overwrite") == 2
    assert merge(tmp_path / "other", "--resume") == 2
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_the_teachers_paint_their_own_data(merge, models, tmp_path):
    teachers = [{"name": "folder", "model": "teacher", "vae": "vae"}, {"name": "lora", "lora": "lora.safetensors"}]
    data = {"synthesize": {"prompts": "prompts.txt", "count": 4, "steps": 2}}
    assert merge(tmp_path / "painted", teachers=teachers, data=data, start="average") == 0
    assert dmm.style_names(dmm.load_pipeline(tmp_path / "painted")) == ["folder", "lora"]


def test_a_student_starts_as_it_is_told(models, tmp_path, merge):
    teachers = [{"name": "folder", "model": "teacher"}, {"name": "lora", "lora": "lora.safetensors"}]
    still = {"steps": 1, "batch_size": 2, "learning_rate": 1e-12, "weight_decay": 0.0, "precision": "fp32"}
    opened = [
        open_pipeline(source).unet.state_dict()
        for source in (
            ModelSource(models / "base"),
            ModelSource(models / "teacher"),
            ModelSource(models / "base", loras=((models / "lora.safetensors", 1.0),)),
        )
    ]
    average = {name: (tensor + opened[2][name]) / 2 for name, tensor in opened[1].items()}
    for start, expected in (("base", opened[0]), ("teacher", opened[1]), ("average", average)):
        assert merge(tmp_path / start, teachers=teachers, training=still, start=start) == 0
        for name, tensor in load_file(tmp_path / start / UNET).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9)


def test_bf16_and_checkpointing(merge, tmp_path):
    training = {"steps": 1, "batch_size": 3, "precision": "bf16", "gradient_checkpointing": True}
    assert merge(tmp_path / "bf16", training=training, size=None) == 0
    assert load_recipe(tmp_path / "bf16" / "recipe.yaml").size == 16  # the base's own
    assert load_file(tmp_path / "bf16" / UNET)["conv_in.weight"].dtype == torch.float32


def test_two_processes_merge_as_one(finished, models, tmp_path, merge):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dmm"]
    command = [*launch, "merge", str(models / "finished.yaml"), "--output", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Wrote ") == 1
    for one, two in zip(*(log_of(folder) for folder in (finished, tmp_path / "two")), strict=True):
        assert two["score"] == pytest.approx(one["score"], rel=1e-4)
    told = json.loads((tmp_path / "two" / "checkpoints" / "step-00000004" / "info.json").read_text())
    assert told["num_processes"] == 2


# what is wrong


def another(models, name, change):
    """A pipeline folder that differs from the base in one thing."""
    pipe = tiny_pipeline()
    change(pipe)
    pipe.save_pretrained(models / name)
    return name


def wider(pipe):
    pipe.register_modules(
        unet=tiny_unet(cross_attention_dim=32), text_encoder=tiny_text_encoder(pipe.tokenizer, hidden_size=32)
    )


def other_schedule(pipe):
    pipe.register_modules(
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.006, beta_schedule="scaled_linear", skip_prk_steps=True)
    )


def predicting_velocity(pipe):
    pipe.scheduler.register_to_config(prediction_type="v_prediction")


def as_sd2(pipe):
    pipe.register_modules(unet=tiny_unet(use_linear_projection=True))


def refused(merge, output, capsys, *options, **changes):
    capsys.readouterr()
    assert merge(output, *options, **changes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert not output.exists()
    return lines[0]


def test_what_is_wrong_is_one_sentence_and_nothing_is_written(merge, models, tmp_path, capsys, monkeypatch):
    def told(*options, **changes):
        return refused(merge, tmp_path / "out", capsys, *options, **changes)

    def with_teacher(**keys):
        return told(teachers=[{"name": "anime", **keys}])

    assert "training.stepz: there is no such key; did you mean 'steps'" in told(training={"stepz": 3})
    assert "there is no file or folder" in with_teacher(model="gone.safetensors")
    sd2 = with_teacher(model=another(models, "sd2", as_sd2))
    assert "teacher 'anime': " in sd2
    assert "is SD 2.x" in sd2
    assert (
        "teacher 'anime': the UNet has cross_attention_dim 32, the student 16. "
        "Choose teachers of one family." in with_teacher(model=another(models, "wider", wider))
    )
    schedule = with_teacher(model=another(models, "betas", other_schedule))
    assert "teacher 'anime': its noise schedule is not the student's: alphas_cumprod at step" in schedule
    assert "teacher 'anime': clip_skip is 2, but the text encoder has 2 layers" in with_teacher(
        model="teacher", clip_skip=2
    )
    assert "teachers 0 and 1 are both named 'a'" in told(teachers=[{"name": "a", "model": "teacher"}] * 2)
    assert "start is average, but teacher 'velocity' predicts v_prediction" in told(start="average")
    velocity = another(models, "predicts-velocity", predicting_velocity)
    assert "losses.noise_weighting is 0.5, which is for a student that predicts epsilon; this base predicts" in told(
        "--set", "losses.noise_weighting=0.5", base=velocity
    )
    assert "frame: SD 1.x models read nothing of a picture's size; leave it out" in told(frame={"corner": [8, 0]})
    assert "training.precision is fp16, which a CPU does not train in" in told("--set", "training.precision=fp16")
    assert "logging.trackers names wandb, which is not installed" in told("--set", "logging.trackers=[wandb]")
    assert "there is a config, which only a base that is a single file needs" in told(config="base")
    assert "give one of them" in told("--resume", "--overwrite")
    assert "of 'cuda'; choose another, or cpu" in told("--device", "cuda:99")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "--device cpu is for one process, and the launcher started 2" in told("--device", "cpu")
    (models / "empty.txt").write_text("\n")
    assert "is empty" in told(data={"synthesize": {"prompts": "empty.txt"}})

    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=10**5)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert "MB for the checkpoints and the result, and its disk has 0.1 MB free" in told()


def test_a_full_disk_leaves_the_last_checkpoint(finished, merge, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "full"
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        patch.setattr(StableDiffusionPipeline, "save_pretrained", full)
        assert merge(folder) == 2
        assert "could not be written: No space left on device" in capsys.readouterr().err
    assert not (folder / "model_index.json").exists()
    assert merge(folder, "--resume") == 0
    assert result_of(folder) == result_of(finished)


def test_a_base_that_is_a_single_file_merges_as_the_folder_it_came_from(merge, models, tmp_path, capsys):
    save_single_file(tiny_pipeline(), models / "base.safetensors")
    training = {**recipe_of(models)["training"], "steps": 1}
    for name, keys in (
        ("folder", {"base": "base"}),
        ("file", {"base": "base.safetensors"}),
        ("told", {"base": "base.safetensors", "config": "base"}),
    ):
        assert merge(tmp_path / name, training=training, **keys) == 0, capsys.readouterr().err
    results = [result_of(tmp_path / name) for name in ("folder", "file", "told")]
    assert results[0][UNET] == results[1][UNET] == results[2][UNET]
    assert results[0][STYLES] == results[1][STYLES] == results[2][STYLES]
    painted = [dmm.load_pipeline(tmp_path / name).tokenizer("a cat").input_ids for name in ("folder", "file")]
    assert painted[0] == painted[1]


def test_loras_of_every_layout_are_teachers_at_once(merge, models, tmp_path, capsys):
    adapted = tiny_pipeline()
    torch.manual_seed(5)
    adapted.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "conv1"]))
    peft = get_peft_model_state_dict(adapted.unet)
    save_kohya_lora(models / "kohya.safetensors", {"unet": adapted.unet}, SD1)
    StableDiffusionPipeline.save_lora_weights(models / "peft", peft)
    StableDiffusionPipeline.save_lora_weights(models / "diffusers", convert_state_dict_to_diffusers(peft))
    teachers = [
        {"name": "kohya", "lora": "kohya.safetensors", "lora_scale": 0.5},
        {"name": "peft", "lora": "peft", "lora_scale": 0.5},
        {"name": "diffusers", "lora": "diffusers/pytorch_lora_weights.safetensors", "lora_scale": 1},
    ]
    training = {**recipe_of(models)["training"], "steps": 1}
    assert merge(tmp_path / "loras", teachers=teachers, training=training) == 0, capsys.readouterr().err
    pipe = dmm.load_pipeline(tmp_path / "loras")
    assert dmm.style_names(pipe) == ["kohya", "peft", "diffusers"]
    # one LoRA in three layouts is one teacher, and at another scale another
    error = log_of(tmp_path / "loras")[-1]
    base = open_pipeline(ModelSource(models / "base")).unet.state_dict()
    delta = [
        open_pipeline(ModelSource(models / "base", loras=((models / path, 1.0),))).unet.state_dict()[name] - base[name]
        for path in ("kohya.safetensors", "peft", "diffusers/pytorch_lora_weights.safetensors")
        for name in ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",)
    ]
    torch.testing.assert_close(delta[0], delta[1])
    torch.testing.assert_close(delta[0], delta[2])
    assert delta[0].abs().max() > 0
    assert {"score_error/kohya", "score_error/peft", "score_error/diffusers"} <= error.keys()
