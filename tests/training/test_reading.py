"""Merges of a teacher with a text encoder of its own: its style reads as it does, in training and ever after."""

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline, tiny_text_encoder
from helpers import same_weights
from peft import LoraConfig

import dmm
from dmm.cli import main
from dmm.data import TrainingData
from dmm.data.training import STUDENT, reader_in
from dmm.evaluation.held_out import Model, held_out_error, synthesize_held_out
from dmm.evaluation.painting import Painting
from dmm.families import denoiser_of
from dmm.families.sd1 import SD1
from dmm.files.yaml import write_yaml
from dmm.formats.lora import save_kohya_lora
from dmm.models.styles import styled_port
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.styled import load_pipeline
from dmm.recipes.recipe import Recipe
from dmm.training.trainer import Trainer

OWN, ALIKE = {"name": "own", "model": "own"}, {"name": "alike", "model": "alike"}
LINE = {"name": "line", "lora": "line.safetensors"}
WHOLE = {"rank": 16, "train": "none", "samples": 8}  # of most layers the full rank, of the text encoder's all


@pytest.fixture(scope="module")
def models(sd1_folder, tmp_path_factory):
    """Teachers near the base, one of which reads otherwise; and a LoRA that reads otherwise, too."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    for seed, name in enumerate(("alike", "own", "other")):
        pipe, generator = tiny_pipeline(), torch.Generator().manual_seed(seed)
        for part in (pipe.unet, pipe.text_encoder)[: 1 if name == "alike" else 2]:
            for parameter in part.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        if name == "other":
            pipe.register_modules(text_encoder=tiny_text_encoder(pipe.tokenizer, num_hidden_layers=3))
        pipe.save_pretrained(folder / name)
    torch.manual_seed(3)
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "fc1"]))
    save_kohya_lora(folder / "line.safetensors", {"unet": pipe.unet, "text_encoder": pipe.text_encoder}, SD1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture
def run(models, sd1_folder):
    """A dmm command of a recipe, in this process; returns its exit status."""

    def run(command, output, teachers, *options, **changes):
        recipe = {
            "base": str(sd1_folder),
            "teachers": teachers,
            "data": {"synthesize": {"prompts": "prompts.txt", "count": 2, "steps": 2}},
            "size": 16,
            "styles": {"rank": 2, "samples": 8},
            "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
            "losses": {"feature": 0.1},
            "checkpoint": {"every": 1, "keep": 1},
            "logging": {"every": 1, "sample_every": None, "score_error_every": 2},
            **changes,
        }
        path = models / f"{output.name}.yaml"
        path.write_text(write_yaml(recipe))
        try:
            return main([*command, str(path), "--output", str(output), *options])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


@torch.no_grad()
def read(pipe, style=None):
    if style is not None:
        dmm.set_style(pipe, style)
    return pipe.text_encoder(torch.arange(6)[None]).last_hidden_state


def adapters_of(pipe):
    return styled_port(denoiser_of(pipe)).style_prompts.adapters


def styles_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "styles").iterdir()}


def test_a_style_reads_as_its_teacher_and_the_others_as_the_base(run, models, tmp_path):
    assert run(["merge"], tmp_path / "merged", [OWN, ALIKE], styles=WHOLE) == 0
    pipe, teacher = load_pipeline(tmp_path / "merged"), tiny_pipeline()
    assert same_weights(pipe, tiny_pipeline())
    expected = read(open_pipeline(ModelSource(models / "own")))
    assert (read(pipe, "own") - expected).abs().max() < 5e-3
    assert (read(teacher) - expected).abs().max() > 0.1
    assert (read(pipe, "alike")).equal(read(teacher))
    assert adapters_of(pipe)["alike"].text == {}
    # as in the paper
    assert run(["merge"], tmp_path / "without", [OWN], styles={**WHOLE, "text_encoder_rank": 0}) == 0
    without = load_pipeline(tmp_path / "without")
    assert read(without, "own").equal(read(teacher))
    assert adapters_of(without)["own"].text == {}


def test_the_student_learns_what_it_reads_in_each_style(run, tmp_path, monkeypatch):
    asked, conditioning = set(), TrainingData.conditioning

    def spied(data, encoder, rows, dropped):
        asked.add(encoder)
        return conditioning(data, encoder, rows, dropped)

    monkeypatch.setattr(TrainingData, "conditioning", spied)
    assert run(["merge"], tmp_path / "own", [OWN]) == 0
    assert asked == {"own", reader_in("own")}
    asked.clear()
    styles = {"rank": 2, "train": "all", "samples": 8}
    assert run(["merge"], tmp_path / "all", [OWN, ALIKE], styles=styles) == 0
    assert asked == {"own", "alike", reader_in("own"), STUDENT}
    assert adapters_of(load_pipeline(tmp_path / "all"))["own"].text


def test_a_stopped_run_and_what_is_added_later_keep_every_bit(run, tmp_path, monkeypatch):
    assert run(["merge"], tmp_path / "whole", [OWN]) == 0
    step = Trainer._step

    def fail(self, number):
        if number == 1:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(Trainer, "_step", fail)
    assert run(["merge"], tmp_path / "stopped", [OWN]) == 130
    monkeypatch.setattr(Trainer, "_step", step)
    assert read(load_pipeline(tmp_path / "stopped" / "untrained"), "own").equal(
        read(load_pipeline(tmp_path / "whole"), "own")
    )
    assert run(["merge"], tmp_path / "stopped", [OWN], "--resume") == 0
    assert styles_of(tmp_path / "stopped") == styles_of(tmp_path / "whole")
    assert run(["add", str(tmp_path / "whole")], tmp_path / "more", [ALIKE]) == 0
    before, after = styles_of(tmp_path / "whole"), styles_of(tmp_path / "more")
    assert {name: after[name] for name in before if name.startswith("own.")} == {
        name: before[name] for name in before if name.startswith("own.")
    }
    # a run that starts from the merge reads on by what its styles have
    assert run(["merge"], tmp_path / "on", [OWN], start=str(tmp_path / "whole")) == 0
    assert read(load_pipeline(tmp_path / "on"), "own").equal(read(load_pipeline(tmp_path / "whole"), "own"))


def test_a_lora_that_reads_otherwise_is_carried_whole_and_not_trained(run, models, sd1_folder, tmp_path):
    assert run(["merge"], tmp_path / "merged", [LINE], styles={"rank": 4, "samples": 8}) == 0
    assert not (tmp_path / "merged" / "training" / "line").exists()
    teacher = open_pipeline(ModelSource(sd1_folder, loras=((models / "line.safetensors", 1.0),)))
    pipe = load_pipeline(tmp_path / "merged")
    assert (read(pipe, "line") - read(teacher)).abs().max() < 5e-3
    torch.testing.assert_close(pipe.unet.state_dict(), teacher.unet.state_dict(), rtol=1e-4, atol=1e-6)
    # by fewer ranks than it has the rest is to be learnt
    styles = {"rank": 4, "text_encoder_rank": 1, "samples": 8}
    assert run(["merge"], tmp_path / "fewer", [LINE], styles=styles) == 0
    assert (tmp_path / "fewer" / "training" / "line").exists()


def test_a_text_encoder_of_another_shape_is_told_and_the_bases_reads(run, tmp_path, caplog):
    other = {"name": "other", "model": "other"}
    assert run(["merge"], tmp_path / "merged", [other], styles=WHOLE) == 0
    assert "teacher 'other': its text encoder has another shape than the base's, so the style" in caplog.text
    assert read(load_pipeline(tmp_path / "merged"), "other").equal(read(tiny_pipeline()))


def test_a_size_on_disk_is_of_the_text_encoder_too(run, tmp_path, capsys):
    found = {}
    for rank in (0, 4):
        styles = {"size": "60KB", "text_encoder_rank": rank, "train": "none", "samples": 8}
        assert run(["merge"], tmp_path / str(rank), [OWN], styles=styles) == 0
        found[rank] = adapters_of(load_pipeline(tmp_path / str(rank)))["own"].num_parameters
        assert 0.8 * 30_000 < found[rank] <= 30_000
    styles = {"size": "2KB", "train": "none", "samples": 8}
    assert run(["merge"], tmp_path / "refused", [OWN], styles=styles) == 2
    assert "of which the differences of biases, norms and text encoders alone take" in capsys.readouterr().err


def test_its_score_error_is_of_what_it_reads(run, models, sd1_folder, tmp_path):
    found = {}
    for rank in (0, 16):
        folder = tmp_path / str(rank)
        assert run(["merge"], folder, [OWN], styles={**WHOLE, "text_encoder_rank": rank}) == 0
        student = Model(lambda dtype, folder=folder: load_pipeline(folder, torch_dtype=dtype))
        base = Model(lambda dtype: open_pipeline(ModelSource(sd1_folder), torch_dtype=dtype))
        teacher = Model(lambda dtype: open_pipeline(ModelSource(models / "own"), torch_dtype=dtype))
        painting = Painting(steps=2, width=16, height=16)
        made = ({"own": teacher}, student, base, ["a cat", "a dog"], painting, 16, tmp_path / "cache", 0)
        held_out = synthesize_held_out(*made, lambda _: None, num_latents=8)
        error = held_out_error(student, "own", teacher, base, held_out, tmp_path / "cache", own=True)
        found[rank] = error.by_style["own"]
    assert found[16] < 0.3 * found[0]


@pytest.mark.parametrize(
    ("styles", "rank"),
    [({}, 16), ({"rank": 4}, 16), ({"text_encoder_rank": 3}, 3), ({"text_encoder_rank": 0}, 0), ({"rank": 0}, 0)],
)
def test_the_rank_is_sensible_and_the_papers_recipe_stays_the_papers(styles, rank, sd1_folder):
    given = {"base": str(sd1_folder), "teachers": [{"name": "ink", "model": str(sd1_folder)}], "styles": styles}
    recipe = Recipe.model_validate({**given, "data": {"images": str(sd1_folder)}}, context={"folder": sd1_folder})
    assert recipe.styles.text_rank == rank
    with pytest.raises(ValueError, match="text_encoder_rank is 2, but with a rank of 0 styles are prompts"):
        type(recipe.styles)(rank=0, text_encoder_rank=2)
