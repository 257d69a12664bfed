"""Styles are added to a merged model, and taken out, without a change to those that stay."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline, tiny_unet
from distill_helpers import NAMES, new_batch, new_teachers
from safetensors.torch import load_file
from toy import ALPHAS_CUMPROD, ToyData

import dmm
from dmm.cli import main
from dmm.data import Synthesis, prepare_data
from dmm.data.synthesis import share_out
from dmm.data.training import STUDENT, student_in
from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.files.yaml import write_yaml
from dmm.maths.processes import VariancePreserving
from dmm.maths.sharing import share_batch
from dmm.models.student import StyledStudent, grow, shrink
from dmm.models.styles import StylePrompts
from dmm.models.teachers import freeze
from dmm.pipeline.samplers import DEFAULT_SAMPLER
from dmm.pipeline.sampling import sample_latents
from dmm.pipeline.styled import set_style
from dmm.recipes.further import taken_from
from dmm.recipes.recipe import load_recipe
from dmm.recipes.styles import Styles
from dmm.training.batches import Batches, Role
from dmm.training.distill import EarlierStudent, Part, distill

STYLES_FILE = "styles/diffusion_pytorch_model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def fresh_process():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def models(sd1_folder, tmp_path_factory):
    """A merged model of two styles, and a third teacher."""
    folder = tmp_path_factory.mktemp("models")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for seed in (1, 2, 3):
        tiny_pipeline(seed).save_pretrained(folder / f"teacher-{seed}")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    recipe = recipe_of({"base": str(sd1_folder), "teachers": teachers(ink=1, photo=2)})
    (folder / "merge.yaml").write_text(write_yaml(recipe))
    assert main(["merge", str(folder / "merge.yaml"), "--output", str(folder / "merged")]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    yield folder
    patch.undo()


def teachers(**seeds):
    return [{"name": name, "model": f"teacher-{seed}"} for name, seed in seeds.items()]


def recipe_of(changes):
    return {
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 2, "steps": 1, "guidance": 1}},
        "size": 16,
        "styles": {"rank": 0},
        "training": {"steps": 2, "batch_size": 6, "learning_rate": 1e-3, "precision": "fp32"},
        "logging": {"every": 1, "sample_every": None},
        **changes,
    }


def add(models, output, *options, **changes):
    recipe = models / f"{output.name}.yaml"
    recipe.write_text(write_yaml(recipe_of({"teachers": teachers(line=3), **changes})))
    return main(["add", str(models / "merged"), str(recipe), "--output", str(output), *options])


def test_a_style_is_added_beside_those_that_are_there(models, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (models / "merged").rglob("*.safetensors")}
    assert add(models, tmp_path / "more") == 0, capsys.readouterr().err
    pipe = dmm.load_pipeline(tmp_path / "more")
    assert dmm.style_names(pipe) == ["ink", "photo", "line"]
    told = json.loads((tmp_path / "more" / "styles" / "styles.json").read_text())["styles"]
    assert [one["source"].split("/")[-1] for one in told] == ["teacher-1", "teacher-2", "teacher-3"]
    log = [json.loads(line) for line in (tmp_path / "more" / "log.jsonl").read_text().splitlines()]
    assert {"score/line", "score/ink", "score/photo"} <= log[-1].keys()
    assert {path: path.read_bytes() for path in before} == before
    assert not torch.equal(load_file(tmp_path / "more" / UNET)["conv_in.weight"], pipe.unet.conv_in.weight * 0)


def test_it_can_go_on_and_on_and_resumes_to_the_bit(models, tmp_path, capsys):
    assert add(models, tmp_path / "whole") == 0
    assert add(models, tmp_path / "cut", training={**recipe_of({})["training"], "steps": 1}) == 0
    assert add(models, tmp_path / "cut", "--resume") == 0, capsys.readouterr().err
    for name in (STYLES_FILE, UNET):
        whole, cut = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    again = models / "again.yaml"
    again.write_text(write_yaml(recipe_of({"teachers": teachers(more=1)})))
    assert main(["add", str(tmp_path / "whole"), str(again), "--output", str(tmp_path / "again")]) == 0
    assert dmm.style_names(dmm.load_pipeline(tmp_path / "again")) == ["ink", "photo", "line", "more"]


def test_two_processes_add_as_one(models, tmp_path):
    # the pictures that the earlier model paints are shared out: each process finds the other's by the same bits
    assert add(models, tmp_path / "one", seed=4) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dmm"]
    command = ["add", str(models / "merged"), str(models / "one.yaml"), "--output", str(tmp_path / "two")]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*launch, *command], env={**os.environ, **cache}, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        assert json.loads(two)["score"] == pytest.approx(json.loads(one)["score"], rel=1e-3)


def test_what_a_recipe_does_not_say_is_the_earlier_merges(models, tmp_path, capsys):
    recipe = models / "short.yaml"
    short = {"teachers": teachers(line=3), "data": {"synthesize": {"prompts": "prompts.txt", "count": 2}}}
    recipe.write_text(
        write_yaml({**short, "styles": {"rank": 0}, "training": {"steps": 1}, "logging": {"sample_every": None}})
    )
    command = ["add", str(models / "merged"), str(recipe), "--output", str(tmp_path / "more")]
    assert main([*command, "--set", "losses.feature=0.5"]) == 0
    told, head, training, *_ = capsys.readouterr().out.splitlines()
    assert head == "3 styles (ink, photo, line) merged on the CPU with 1 thread, in fp32."
    assert "1 step of 6 samples, 6 in all, 2 to 3 of each style; learning rate 0.0005" in training
    assert told.startswith(f"Taken from {models / 'merged' / 'recipe.yaml'}, since {recipe} does not say (rates: half ")
    assert "size=16, " in told
    assert "losses.feature" not in told
    run, merged = (load_recipe(folder / "recipe.yaml") for folder in (tmp_path / "more", models / "merged"))
    assert (run.size, run.training.batch_size, run.training.precision) == (16, 6, "fp32")
    assert (run.data.synthesize.steps, run.data.synthesize.guidance) == (1, 1)
    assert run.training.learning_rate == merged.training.learning_rate / 2
    assert run.losses == merged.losses.model_copy(update={"feature": 0.5})
    # an addition's rates were halved once
    assert taken_from(run, {}, [], has_adapters=False)["training.learning_rate"] == run.training.learning_rate


def test_what_is_said_stays_and_pictures_of_ones_own_are_not_painted(models):
    merged = load_recipe(models / "merged" / "recipe.yaml")
    given = {"size": 8, "training": {"precision": "bf16"}, "data": {"images": "pictures"}, "losses": None}
    taken = taken_from(merged, given, ["training.batch_size", "losses"], has_adapters=False)
    assert set(taken) == {"training.micro_batch_size", "training.gradient_checkpointing", "training.learning_rate"}


def test_a_merge_of_another_kind_gives_neither_losses_nor_batches_nor_rates(models):
    prompts = load_recipe(models / "merged" / "recipe.yaml")
    taken = taken_from(prompts, {}, [], has_adapters=True)
    assert set(taken) == {"size", "training.precision", "training.gradient_checkpointing"}
    adapters = prompts.model_copy(update={"styles": Styles(error=0.1)})
    taken = taken_from(adapters, {}, [], has_adapters=True)
    assert (taken["styles.error"], taken["training.learning_rate"]) == (0.1, prompts.training.learning_rate)
    assert "styles.rank" not in taken
    # another size than the earlier one is said in other words
    assert not any("styles" in key for key in taken_from(adapters, {"styles": {"rank": 4}}, [], has_adapters=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teachers": teachers(ink=3)}, "teacher 'ink': {merged} has a style of that name; choose another name."),
        ({"start": "average"}, "start is 'average', but a merge that goes further starts from the earlier one, or"),
        ({"teachers": [{"name": "x", "lora": "lora.safetensors"}]}, "teacher 'x' is a LoRA, and a merged model is not"),
        (
            {"earlier": {"regularization": 1}},
            "earlier.regularization: found 1, expected a number at least 0 and below 1",
        ),
        (
            {"training": {"batch_size": 1}},
            "training.batch_size is 1, expected at least 2: every teacher needs a sample in each step.",
        ),
        (
            {"earlier": {"regularization": 0.05}},
            "Raise it, or that teacher's weight (teacher 1 is the earlier merge, of earlier.regularization).",
        ),
    ],
)
def test_what_cannot_be_added_is_told_in_one_sentence(models, tmp_path, capsys, changes, message):
    (models / "lora.safetensors").touch()
    assert add(models, tmp_path / "more", **changes) == 2
    assert message.format(merged=models / "merged") in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_only_merged_models_are_added_to(models, sd1_folder, tmp_path, capsys):
    recipe = models / "stock.yaml"
    recipe.write_text(write_yaml(recipe_of({"teachers": teachers(line=3)})))
    assert main(["add", str(sd1_folder), str(recipe), "--output", str(tmp_path / "more")]) == 2
    assert "is no merged model: it has no styles/ folder" in capsys.readouterr().err


def test_a_grown_codebook_keeps_its_rows_and_a_shrunk_one_the_others():
    torch.manual_seed(0)
    prompts = StylePrompts(["a", "b"], dim=8)
    grown = grow(prompts, ["c"])
    assert grown.names == ["a", "b", "c"]
    assert torch.equal(grown(torch.eye(3)[:2]), prompts(torch.eye(2)))
    assert grown.embeddings[2].norm() > 0.1
    shrunk = shrink(grown, "b")
    assert shrunk.names == ["a", "c"]
    assert torch.equal(shrunk(torch.eye(2)), grown(torch.eye(3)[[0, 2]]))
    with pytest.raises(UserError, match="'a' is the only style"):
        shrink(shrink(shrunk, "c"), "a")


def new_student(names=NAMES):
    torch.manual_seed(0)
    unet = tiny_unet()
    return StyledStudent(unet, StylePrompts(names, dim=unet.time_embedding.linear_2.out_features), SD1)


def test_a_student_that_has_not_moved_says_what_it_said():
    earlier = new_student()
    student = StyledStudent(copy.deepcopy(earlier.unet), grow(earlier.style_prompts, ["line"]), SD1)
    batch = new_batch(earlier)
    weights = torch.cat([batch.style_weights, torch.zeros(len(batch.style_weights), 1)], 1)
    parts = [Part(0, slice(None), batch.conditioning)]
    batch = type(batch)(**{**vars(batch), "style_weights": weights, "parts": parts})
    teacher = EarlierStudent(freeze(earlier))
    result = distill(student, [teacher], batch, feature_weight=0.1)
    assert all(values.abs().max() < 1e-10 for values in result.terms.values())
    assert not any(parameter.requires_grad for parameter in teacher.denoiser.parameters())
    moved = distill(student, [new_teachers()[0]], batch, feature_weight=0.1)
    assert moved.terms["score"].min() > 1e-6


def test_earlier_styles_are_drawn_at_random_on_their_own_rows():
    class Data(ToyData):
        def rows_of(self, painter):
            rows = {"ink": range(10), "photo": range(10, 20), "line": range(20, 32)}
            return torch.tensor(rows.get(painter, []), dtype=torch.int64)

        def conditioning(self, encoder, rows, dropped):
            asked.append((encoder, rows.tolist()))
            return super().conditioning(STUDENT, rows, dropped)

    asked = []
    roles = [Role([2], "line", 0.5), Role([0, 1], STUDENT, 0.5)]
    groups = share_batch(64, [0.5, 0.5], 1, 0)
    settings = {
        "process": VariancePreserving(ALPHAS_CUMPROD),
        "caption_dropout": 0.1,
        "micro_batch_size": 64,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    batches = Batches(
        Data(), ["ink", "photo", "line"], roles, groups=groups, own=(1.0, 0.0), noise_weighting=0.5, **settings
    )
    (batch,) = batches.of_step(0)
    styles = batch.style_weights.argmax(1)
    assert (styles[:32] == 2).all()
    assert 8 <= (styles[32:] == 0).sum() <= 24
    assert (styles[32:] < 2).all()
    weights = ALPHAS_CUMPROD[batch.timesteps] ** -0.5 / (ALPHAS_CUMPROD**-0.5).mean()
    torch.testing.assert_close(batch.score_weights, weights)
    (line, line_rows), (student, earlier_rows), _ = asked
    assert (line, student) == ("line", STUDENT)
    assert min(line_rows) >= 20
    for row, style in zip(earlier_rows, styles[32:].tolist(), strict=True):
        assert row // 10 == style


def test_a_style_is_removed_and_the_others_stay_to_the_bit(models, tmp_path, capsys):
    merged, left = models / "merged", tmp_path / "left"
    assert main(["remove", str(merged), "ink", "--output", str(left)]) == 0
    assert "'ink' cannot be asked for any more" in capsys.readouterr().out
    assert (left / UNET).read_bytes() == (merged / UNET).read_bytes()
    whole, rest = load_file(merged / STYLES_FILE), load_file(left / STYLES_FILE)
    assert torch.equal(rest["embeddings"], whole["embeddings"][1:])
    pipe = dmm.load_pipeline(left)
    assert dmm.style_names(pipe) == ["photo"]
    for name, message in (("ink", "There is no style 'ink'"), ("photo", "'photo' is the only style")):
        assert main(["remove", str(left), name, "--output", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["merge", "add"])
def test_a_model_without_a_style_is_not_taken_for_the_finished_merge(models, tmp_path, capsys, command):
    if command == "merge":
        argv = ["merge", str(models / "merge.yaml")]
        whole = models / "merged"
    else:
        assert add(models, tmp_path / "more") == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = ["add", str(models / "merged"), str(models / "more.yaml")]
        whole = tmp_path / "more"
    output = tmp_path / "without"
    assert main(["remove", str(whole), "photo", "--output", str(output)]) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*argv, "--output", str(output), "--resume"]) == 2
    assert "without photo it is not what the recipe makes" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_second_stage_goes_on_from_the_first_on_each_teachers_own_pictures(models, sd1_folder, tmp_path, capsys):
    recipe = recipe_of({"base": str(sd1_folder), "teachers": teachers(ink=1, photo=2)})
    paint = {**recipe["data"]["synthesize"], "seed": 1}
    recipe["finetune"] = {"synthesize": paint, "training": {**recipe["training"], "steps": 1}}
    path, output = models / "finetune.yaml", tmp_path / "merged"
    path.write_text(write_yaml(recipe))
    assert main(["merge", str(path), "--output", str(output)]) == 0, capsys.readouterr().err
    first, second = (load_file(folder / STYLES_FILE) for folder in (output / "first-stage", output))
    alone = load_file(models / "merged" / STYLES_FILE)  # the same recipe without a second stage
    assert all(torch.equal(first[key], alone[key]) for key in alone)
    assert not torch.equal(first["embeddings"], second["embeddings"])
    assert (first["embeddings"] - second["embeddings"]).abs().max() < 0.01  # one step, not a new beginning
    capsys.readouterr()
    assert main(["merge", str(path), "--output", str(output), "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    renamed = output.rename(tmp_path / "renamed")  # its second stage began from a folder that is gone
    assert main(["merge", str(path), "--output", str(renamed), "--resume"]) == 0, capsys.readouterr().err
    renamed.rename(output)
    assert main(["merge", str(path), "--output", str(output)]) == 2
    assert main(["merge", str(path), "--output", str(output), "--overwrite"]) == 0, capsys.readouterr().err


def test_a_second_stage_on_what_the_student_painted_in_each_style(models, sd1_folder, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(
        dmm.training.preparing, "prepare_data", lambda *a, **k: made.append(prepare_data(*a, **k)) or made[-1]
    )
    recipe = recipe_of({"base": str(sd1_folder), "teachers": teachers(ink=1, photo=2)})
    shares = {"own": 0.5, "student": 0.5}
    paint = {**recipe["data"]["synthesize"], **shares}
    recipe["finetune"] = {"synthesize": paint, "training": {**recipe["training"], "steps": 1}}
    path, output = models / "mistakes.yaml", tmp_path / "merged"
    path.write_text(write_yaml(recipe))
    assert main(["merge", str(path), "--output", str(output)]) == 0, capsys.readouterr().err
    assert [load_recipe(folder / "recipe.yaml").seed for folder in (output / "first-stage", output)] == [0, 1]
    first, second = made
    assert (first.num_rows, second.num_rows) == (4, 8)
    prompts = ["a cat", "a dog"]
    pipe = dmm.load_pipeline(output / "first-stage")
    for style in ("ink", "photo"):
        assert first.rows_of(student_in(style)).tolist() == []
        set_style(pipe, style)
        synthesis = Synthesis(prompts, 8, steps=1, guidance_scale=1)
        share = share_out(synthesis, 4)[2 + ["ink", "photo"].index(style)]
        settings = {"steps": 1, "guidance_scale": 1, "negative_prompt": "", "width": 16, "height": 16}
        painted = sample_latents(pipe, share.prompts, share.seeds, sampler=DEFAULT_SAMPLER, **settings)
        expected = torch.stack(list(painted)).half().float()
        torch.testing.assert_close(second.latents(second.rows_of(student_in(style))), expected, rtol=0, atol=1e-3)


def test_what_is_added_has_a_second_stage_too(models, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(
        dmm.training.preparing, "prepare_data", lambda *a, **k: made.append(prepare_data(*a, **k)) or made[-1]
    )
    training = {"steps": 1, "batch_size": 6, "learning_rate": 1e-3, "precision": "fp32"}
    painted = {"prompts": "prompts.txt", "count": 2, "steps": 1, "guidance": 1, "own": 0.4, "student": 0.4}
    second = {"finetune": {"synthesize": painted, "training": training}}
    output = tmp_path / "more"
    assert add(models, output, **second) == 0, capsys.readouterr().err
    first, both = (load_file(folder / STYLES_FILE) for folder in (output / "first-stage", output))
    assert first["embeddings"].shape == both["embeddings"].shape == (3, 32)
    assert 0 < (first["embeddings"] - both["embeddings"]).abs().max() < 0.01
    painters = ["ink", "photo", "line", *(student_in(style) for style in ("ink", "photo", "line"))]
    assert [made[1].rows_of(painter).tolist() for painter in painters] == [[2 * i, 2 * i + 1] for i in range(6)]
    capsys.readouterr()
    assert add(models, output, "--resume", **second) == 0
    assert "finished already" in capsys.readouterr().out


def test_an_add_starts_from_no_model_without_the_styles(models, sd1_folder, tmp_path, capsys):
    assert add(models, tmp_path / "more", start=str(sd1_folder)) == 2
    assert "has no styles. What is added to a merged model starts from that model" in capsys.readouterr().err
    assert add(models, tmp_path / "more", start=str(models / "merged")) == 2
    assert "the earlier styles and the teachers are ink, photo, line" in capsys.readouterr().err


def test_the_students_pictures_of_a_style_are_that_styles_alone():
    class Data(ToyData):
        def rows_of(self, painter):
            painters = ["ink", "photo", student_in("ink"), student_in("photo")]
            return torch.arange(8) + 8 * painters.index(painter)

        def conditioning(self, encoder, rows, dropped):
            asked.append(rows)
            return super().conditioning(STUDENT, rows, dropped)

    asked = []
    roles = [Role([0], "ink", 0.5), Role([1], "photo", 0.5)]
    batches = Batches(
        Data(),
        ["ink", "photo"],
        roles,
        groups=share_batch(400, [0.5, 0.5], 1, 0),
        own=(0.25, 0.5),
        process=VariancePreserving(ALPHAS_CUMPROD),
        caption_dropout=0.1,
        micro_batch_size=400,
        seed=0,
        device=torch.device("cpu"),
    )
    list(batches.of_step(0))
    for style, rows in enumerate(asked[:2]):
        painter = torch.bincount(rows // 8, minlength=4) / len(rows)
        # a quarter is the teacher's, a quarter of any teacher
        expected = [0.125, 0.125, 0.0, 0.0]
        expected[style] += 0.25
        expected[2 + style] += 0.5
        assert painter.tolist() == pytest.approx(expected, abs=0.09)
        assert painter[3 - style] == 0


def test_a_start_without_styles_cannot_paint_in_them(models, sd1_folder, tmp_path, capsys):
    recipe = recipe_of({"base": str(sd1_folder), "start": str(sd1_folder), "teachers": teachers(ink=1, photo=2)})
    recipe["data"]["synthesize"]["student"] = 0.5
    (models / "student.yaml").write_text(write_yaml(recipe))
    assert main(["merge", str(models / "student.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "has no styles to paint in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_second_stage_is_told_before_the_first(models, sd1_folder, tmp_path, capsys):
    (models / "nothing.txt").write_text("\n")
    recipe = recipe_of({"base": str(sd1_folder), "teachers": teachers(ink=1, photo=2)})
    recipe["finetune"] = {"synthesize": {"prompts": "nothing.txt"}}
    (models / "empty.yaml").write_text(write_yaml(recipe))
    assert main(["merge", str(models / "empty.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "nothing.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_no_start_for_other_styles(models, sd1_folder, tmp_path, capsys):
    merged = str(models / "merged")
    recipe = recipe_of({"base": str(sd1_folder), "start": merged, "teachers": teachers(ink=1, line=2)})
    (models / "start.yaml").write_text(write_yaml(recipe))
    assert main(["merge", str(models / "start.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "is a merged model of ink, photo, the teachers are ink, line" in capsys.readouterr().err
