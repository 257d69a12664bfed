"""The command: from folders to a report, alone and in two processes; what it refuses, before anything is painted."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dmm.cli import main
from dmm.recipes.recipe import load_recipe, save_recipe


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\na tree\n")
    return path


@pytest.fixture
def arguments(merged, sd1_folder, sd1_file, dino, prompts):
    """Of an evaluation of two styles, one teacher a folder and one a file."""
    return [
        *("evaluate", str(merged), "--teacher", f"ink={sd1_folder}", "--teacher", f"photo={sd1_file}"),
        *("--base", str(sd1_folder), "--prompts", str(prompts), "--num-images", "100", "--extractor", f"dino={dino}"),
        *("--steps", "1", "--guidance", "1", "--precision", "fp32"),
    ]


def read(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_two_processes_find_what_one_finds(arguments, sd1_folder, tmp_path, capsys):
    # a teacher that is the base would leave nothing to measure the score error beside
    arguments[arguments.index("--base") + 1] = str(shifted(sd1_folder, tmp_path / "base"))
    assert main([*arguments, "--output", str(tmp_path / "one"), "--cache", str(tmp_path / "cache-one")]) == 0
    assert f"Wrote {tmp_path / 'one'}/report.html" in capsys.readouterr().out
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dmm", *arguments]
    command += ["--output", str(tmp_path / "two"), "--cache", str(tmp_path / "cache-two")]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Wrote") == 1
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert (one["settings"]["num_processes"], two["settings"]["num_processes"]) == (1, 2)
    for key in ("fid_matrix", "fid_reference"):
        for ours, theirs in zip(one[key], two[key], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    assert one["score_error"]["by_style"] == pytest.approx(two["score_error"]["by_style"], rel=1e-4)
    assert one["kid"]["student"]["mean"] == pytest.approx(two["kid"]["student"]["mean"], rel=1e-3)
    assert one["sources"] == two["sources"]


def test_a_quick_evaluation_needs_no_number_of_pictures_and_has_no_fid(arguments, tmp_path, capsys):
    at = arguments.index("--num-images")
    quick = [*arguments[:at], *arguments[at + 2 :], "--quick"]
    # the base is a teacher here, beside which there is nothing to measure
    at = quick.index("--base")
    quick = [*quick[:at], *quick[at + 2 :]]
    assert main([*quick, "--output", str(tmp_path / "report"), "--cache", str(tmp_path / "cache")]) == 0
    told = capsys.readouterr().out
    assert "KID x 1000: " in told
    assert "FIDt" not in told
    figures = read(tmp_path / "report")
    assert (figures["num_images"], figures["fidt"]) == (64, None)


def shifted(folder, target):
    """A copy of a pipeline whose UNet is another."""
    from dmm.models.teachers import ModelSource, open_pipeline

    pipeline = open_pipeline(ModelSource(folder))
    for parameter in pipeline.unet.parameters():
        parameter.data += 0.05
    pipeline.save_pretrained(target)
    return target


def refusal(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_bad_input_is_told_before_anything_is_painted(arguments, merged, dino, tmp_path, capsys):
    output, cache = ("--output", tmp_path / "report"), ("--cache", tmp_path / "cache")

    def told(*more):
        return refusal(capsys, *arguments, *output, *cache, *more)

    assert "no style 'fotto'; did you mean 'photo'" in told("--teacher", f"fotto={merged}")
    assert "'ink' twice" in told("--teacher", f"ink={merged}")
    assert "write NAME=PATH" in told("--teacher", "ink")
    assert "12 features of 'dino': FID needs at least 100" in told("--num-images", "50")
    assert "at least 1, not 0" in told("--num-images", "0")
    assert "no extractor 'judg'; did you mean 'judge'" in told("--extractor", "judg")
    assert "give both or neither" in told("--mix", "ink=0.5,photo=0.5")
    assert "no such file or folder" in told("--teacher", f"clay={tmp_path / 'nowhere'}")
    # which the side-car tells of, and which never were
    told_of = refusal(capsys, "evaluate", merged, "--extractor", "judge", *output)
    assert "teacher 'ink': models/ink.safetensors: no such file or folder" in told_of
    assert "Teachers that have moved are named with --teacher NAME=PATH" in told_of
    assert "--prompts FILE is missing" in refusal(capsys, "evaluate", merged, "--extractor", f"dino={dino}", *output)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").touch()
    assert "not empty" in told()
    assert not (tmp_path / "cache").exists()


def test_the_recipes_teachers_are_taken_if_they_are_those_that_were_merged(
    merged, sd1_folder, prompts, dino, tmp_path, capsys
):
    folder = shutil.copytree(merged, tmp_path / "merged")
    teachers = [f"{{name: {name}, model: {sd1_folder}}}" for name in ("ink", "photo", "clay")]
    (tmp_path / "recipe.yaml").write_text(
        f"base: {sd1_folder}\nteachers: [{', '.join(teachers)}]\ndata: {{synthesize: {{prompts: {prompts}}}}}\n"
    )
    save_recipe(load_recipe(tmp_path / "recipe.yaml"), folder / "recipe.yaml")
    told = refusal(
        capsys, "evaluate", folder, "--extractor", f"dino={dino}", "--prompts", prompts, "--output", tmp_path / "report"
    )
    # the tiny merge's provenance names files that never were
    assert f"teacher 'ink': {sd1_folder} is not the model that was merged" in told
