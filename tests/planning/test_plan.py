"""``dmm plan``: figures before a merge, that hold while it runs; what to change where it does not fit."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_pipeline
from tiny_families import TINY

from dmm.cli import main
from dmm.demo.story import PAPER, write_recipe
from dmm.files.yaml import write_yaml
from dmm.planning import look as looking
from dmm.planning import step as steps
from dmm.planning.advice import changed, cheapest, told
from dmm.planning.look import look
from dmm.planning.step import trace_calibration, trace_step
from dmm.recipes.recipe import Recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(sd1_folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("plan")
    shutil.copytree(sd1_folder, made / "base")
    tiny_pipeline(1).save_pretrained(made / "teacher")
    (made / "prompts.txt").write_text("a cat\na dog\n")
    return made


def recipe_of(folder, **changes):
    keys = {
        "base": "base",
        "teachers": [{"name": "ink", "model": "teacher"}, {"name": "clay", "model": "teacher", "weight": 2}],
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 10, "steps": 3}},
        "size": 16,
        "styles": {"rank": 0},
        "training": {"steps": 5, "batch_size": 6, "micro_batch_size": 4, "precision": "fp32"},
        **changes,
    }
    (folder / "recipe.yaml").write_text(write_yaml(keys))
    return folder / "recipe.yaml"


def planned(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_figure_has_its_parts(folder, capsys):
    plan = planned(capsys, recipe_of(folder), "--device", "cpu")
    assert list(plan) == ["memory", "disk", "samples", "flops", "hours"]
    of_phase = plan["memory"]["phases"][plan["memory"]["phase"]]
    assert plan["memory"]["total"] == sum(of_phase.values())
    parts = {"shared weights", "gradients", "moments", "teachers", "activations", "libraries"}
    assert parts <= plan["memory"]["phases"]["training"].keys()
    assert plan["disk"]["total"] == sum(plan["disk"]["parts"].values())
    assert {"cache", "checkpoints", "result"} == plan["disk"]["parts"].keys()
    assert plan["samples"] == {"training": 30, "pictures": 20}
    assert plan["flops"]["total"] == pytest.approx(sum(plan["flops"]["parts"].values()))
    assert {"painting", "training", "watching", "samples"} == plan["flops"]["parts"].keys()
    assert all(one["hours"] > 0 and one["known"] for one in plan["hours"].values())


def test_grids_of_samples_cost_what_their_pictures_do(folder, capsys):
    recipe = recipe_of(folder, training={"steps": 10, "batch_size": 3, "micro_batch_size": 3})
    settings = ["--set", "logging.sample_every=4", "--set", "logging.sample_steps=3"]
    parts = planned(capsys, recipe, "--device", "cpu", *settings, "--set", "logging.sample_guidance=1")["flops"][
        "parts"
    ]
    num_styles, num_prompts, num_grids = 2, 4, 3
    pictures = (num_grids + 1) * num_styles * num_prompts  # the teachers' beside them
    assert parts["samples"] / (3 * pictures) == pytest.approx(parts["painting"] / (20 * 3 * 2))  # guided


def test_adapters_are_calibrated_and_dealt_and_every_style_is_trained_by_itself(folder, capsys):
    plan = planned(capsys, recipe_of(folder, styles={"rank": 2}), "--device", "cpu")
    assert list(plan["memory"]["phases"]) == ["encoding", "calibration", "dealing", "training", "samples"]
    assert plan["samples"]["training"] == 6 * (5 + 10)
    assert {"calibration", "untrained"} < plan["disk"]["parts"].keys()
    none = planned(capsys, recipe_of(folder, styles={"rank": 2, "train": "none"}), "--device", "cpu")
    assert none["samples"]["training"] == 0
    assert "training" not in none["memory"]["phases"]


def test_a_second_stage_has_figures_of_its_own(folder, capsys):
    second = {"synthesize": {"prompts": "prompts.txt", "count": 7}, "training": {"steps": 3, "batch_size": 4}}
    plan = planned(capsys, recipe_of(folder, finetune=second), "--device", "cpu")
    assert plan["finetune"]["samples"] == {"training": 12, "pictures": 14}


def test_what_it_prints(folder, capsys):
    assert main(["plan", str(recipe_of(folder)), "--memory", "24GB", "--processes", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 styles (ink, clay) in 2 processes, each on a GPU, in fp32.")
    assert "It fits 24 GB." in text
    assert "Measured: 60.3 samples/s on an H200" in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_planned_by_the_bases_configs_alone(path, folder, capsys, monkeypatch):
    def fetch(hub_id, allow_patterns):
        assert hub_id == load_recipe(path).base
        assert all(pattern.endswith(".json") for pattern in allow_patterns)
        return str(folder / "base")

    monkeypatch.setattr(looking, "snapshot_download", fetch)
    plan = planned(capsys, path, "--set", "size=16")
    assert plan["samples"]["training"] == 32_000_000


def test_adapters_may_be_more_than_a_batch_has_samples(folder, capsys):
    teachers = [{"name": f"style-{i}", "model": "teacher"} for i in range(9)]
    training = {"steps": 5, "batch_size": 2, "precision": "fp32"}
    plan = planned(capsys, recipe_of(folder, teachers=teachers, styles={"rank": 2}, training=training))
    assert plan["samples"]["training"] == 9 * 5 * 2


@pytest.mark.parametrize("styles", [{"rank": 0}, {"rank": 2}], ids=["rank 0", "rank 2"])
def test_a_merge_of_sdxl_is_planned_with_both_of_its_text_encoders(tmp_path, capsys, styles):
    for seed, name in enumerate(("base", "teacher")):
        TINY["sdxl"](seed).save_pretrained(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    plan = planned(capsys, recipe_of(tmp_path, styles=styles), "--device", "cpu")
    base = TINY["sdxl"]()
    readers = sum(
        one.numel() for part in (base.text_encoder, base.text_encoder_2, base.vae) for one in part.parameters()
    )
    assert plan["memory"]["phases"]["encoding"]["readers"] == 4 * readers
    denoiser = sum(one.numel() for one in base.unet.parameters())
    assert plan["memory"]["phases"]["training"]["shared weights"] == 4 * denoiser


def test_what_cannot_fit_is_told(folder, capsys):
    assert main(["plan", str(recipe_of(folder)), "--memory", "0.1GB"]) == 0
    assert "It does not fit 100 MB, whatever is changed" in capsys.readouterr().out


def test_what_a_merge_would_refuse_a_plan_refuses(folder, capsys):
    assert main(["plan", str(recipe_of(folder, size=20))]) == 2
    assert "size" in capsys.readouterr().err


def test_the_cheapest_change_comes_first():
    keys = {"base": "o/m", "teachers": [{"name": "ink", "model": "o/m"}], "data": {"dataset": "d"}}
    recipe = Recipe.model_validate(keys | {"styles": {"rank": 0}})
    assert cheapest(recipe, lambda _: True) == {}
    assert told(cheapest(recipe, lambda one: one.training.micro_batch_size < 8)) == "--set training.micro_batch_size=5"
    slower = cheapest(recipe, lambda one: one.training.gradient_checkpointing)
    assert slower == {"training.gradient_checkpointing": True}
    last = cheapest(recipe, lambda one: one.styles.trained == "adapters")
    assert told(last) == "--set styles='{rank: 16}'"
    assert changed(recipe, last).training.steps == 1000
    assert cheapest(recipe, lambda _: False) is None


def test_activations_grow_evenly_with_the_samples(folder):
    recipe = load_recipe(recipe_of(folder))
    shapes = look(recipe, device=CPU, num_processes=1).shapes
    one, two, four = (
        trace_step(recipe, shapes, rank=0, num_styles=2, num_samples=count, on_gpu=False) for count in (1, 2, 4)
    )
    assert four.num_bytes - two.num_bytes == pytest.approx(2 * (two.num_bytes - one.num_bytes), rel=0.02)
    assert one.flops == pytest.approx(four.flops)
    assert one.num_operations == pytest.approx(four.num_operations, rel=0.05)


def test_a_calibration_is_traced_with_what_looks_at_its_layers(folder, monkeypatch):
    recipe = load_recipe(recipe_of(folder))
    shapes = look(recipe, device=CPU, num_processes=1).shapes
    looked = trace_calibration(recipe, shapes, num_samples=4, on_gpu=False)
    monkeypatch.setattr(
        steps, "Observer", lambda layer, difference: SimpleNamespace(layer=layer, see=lambda *_: None, num_samples=0)
    )
    alone = trace_calibration(recipe, shapes, num_samples=4, on_gpu=False)
    assert looked.flops > 1.3 * alone.flops
    assert looked.num_bytes >= alone.num_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_takes_less_memory_and_more_arithmetic(folder, checkpointing):
    recipe = load_recipe(recipe_of(folder), [f"training.gradient_checkpointing={str(checkpointing).lower()}"])
    shapes = look(recipe, device=CPU, num_processes=1).shapes
    plain = load_recipe(recipe_of(folder))
    told_, asked = (
        trace_step(one, shapes, rank=0, num_styles=2, num_samples=16, on_gpu=False) for one in (plain, recipe)
    )
    assert (asked.num_bytes < told_.num_bytes, asked.flops > told_.flops) == (checkpointing, checkpointing)


def test_a_plan_takes_less_memory_than_500_megabytes_and_tells_what_the_demo_takes(tmp_path):
    # its own peak as the system has it: what getrusage says of a process begins with its parent's
    path = write_recipe(tmp_path, PAPER)
    code = "import sys; from pathlib import Path; from dmm.cli import main; main(sys.argv[1:]); "
    code += "status = Path('/proc/self/status'); print(status.read_text() if status.exists() else '', file=sys.stderr)"
    command = [sys.executable, "-c", code, "plan", str(path), "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    plan = json.loads(done.stdout)
    assert plan["samples"]["training"] == 36_000
    if sys.platform == "linux":
        peak = re.search(r"VmHWM:\s*(\d+) kB", done.stderr)
        assert int(peak[1]) * 1024 < 550e6
