"""Merges of a teacher with a text encoder of its own: its style reads as it does, in training and ever after."""

import logging

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
from dmm.errors import UserError
from dmm.evaluation.held_out import Model, held_out_error, synthesize_held_out
from dmm.evaluation.painting import Painting
from dmm.families import denoiser_of
from dmm.families.sd1 import SD1
from dmm.files.yaml import write_yaml
from dmm.formats.lora import save_kohya_lora
from dmm.models.styles import styled_port
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.styled import load_pipeline
from dmm.recipes.recipe import Recipe, load_recipe
from dmm.training.batches import Batches
from dmm.training.merge import merge
from dmm.training.preflight import check_merge
from dmm.training.trainer import Trainer

OWN, ALIKE, OTHER = ({"name": name, "model": name} for name in ("own", "alike", "other"))
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


@pytest.fixture(scope="module")
def recipe(models, sd1_folder):
    """The file of a recipe."""

    def write(teachers, **changes):
        given = {
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
        path = models / "recipe.yaml"
        path.write_text(write_yaml(given))
        return path

    return write


@pytest.fixture(scope="module")
def run(recipe):
    """A merge by a recipe, in this process; returns its folder."""

    def run(output, teachers, *, resume=False, **changes):
        try:
            return merge(load_recipe(recipe(teachers, **changes)), output, resume=resume).folder
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A merge, and whose text encoders its batches were read by."""
    asked, conditioning = set(), TrainingData.conditioning

    def spied(data, encoder, rows, dropped):
        asked.add(encoder)
        return conditioning(data, encoder, rows, dropped)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingData, "conditioning", spied)
        return run(tmp_path_factory.mktemp("runs") / "trained", [OWN]), asked


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A merge without training at full rank, and what it told."""
    told, handler = [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("dmm.training.reading").addHandler(handler)
    return run(tmp_path_factory.mktemp("runs") / "whole", [OWN, ALIKE, OTHER], styles=WHOLE), told


@pytest.fixture(scope="module")
def without(run, tmp_path_factory):
    """The same as in the paper, where the base reads."""
    styles = {**WHOLE, "text_encoder_rank": 0}
    return run(tmp_path_factory.mktemp("runs") / "without", [OWN, ALIKE, OTHER], styles=styles)


@torch.no_grad()
def read(pipe, style=None):
    if style is not None:
        dmm.set_style(pipe, style)
    return pipe.text_encoder(torch.arange(6)[None]).last_hidden_state


def adapters_of(pipe):
    return styled_port(denoiser_of(pipe)).style_prompts.adapters


def styles_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "styles").iterdir()}


def test_a_style_reads_as_its_teacher_and_the_others_as_the_base(whole, without, models):
    pipe, base = load_pipeline(whole[0]), read(tiny_pipeline())
    assert same_weights(pipe, tiny_pipeline())
    expected = read(open_pipeline(ModelSource(models / "own")))
    assert (read(pipe, "own") - expected).abs().max() < 5e-3
    assert (base - expected).abs().max() > 0.1
    for name in ("alike", "other"):
        assert read(pipe, name).equal(base)
        assert adapters_of(pipe)[name].text == {}
    (told,) = whole[1]
    assert told.startswith("teacher 'other': its text encoder has another shape than the base's, so the style reads")
    papers = load_pipeline(without)
    assert read(papers, "own").equal(base)
    assert adapters_of(papers)["own"].text == {}


def test_a_plan_counts_what_text_encoders_take(whole, recipe):
    planned = check_merge(load_recipe(recipe([OWN], styles=WHOLE)), 1, torch.device("cpu")).sizes.text_adapter
    text = adapters_of(load_pipeline(whole[0]))["own"].text
    assert planned == sum(one.num_parameters for one in text.values())
    papers = load_recipe(recipe([OWN], styles={**WHOLE, "text_encoder_rank": 0}))
    assert check_merge(papers, 1, torch.device("cpu")).sizes.text_adapter == 0


def test_the_score_error_is_of_what_each_style_reads(whole, without, models, sd1_folder, tmp_path):
    found = {}
    for folder in (whole[0], without):
        student = Model(lambda dtype, folder=folder: load_pipeline(folder, torch_dtype=dtype))
        base = Model(lambda dtype: open_pipeline(ModelSource(sd1_folder), torch_dtype=dtype))
        teacher = Model(lambda dtype: open_pipeline(ModelSource(models / "own"), torch_dtype=dtype))
        painting = Painting(steps=2, width=16, height=16)
        made = ({"own": teacher}, student, ["a cat", "a dog"], painting, 16, tmp_path / "cache", 0)
        held_out = synthesize_held_out(*made, lambda _: None, num_latents=8)
        error = held_out_error(student, "own", teacher, base, held_out, tmp_path / "cache", own=True)
        found[folder] = error.by_style["own"]
    assert found[whole[0]] < 0.3 * found[without]


def test_the_student_learns_what_it_reads_in_each_style(trained, run, tmp_path, monkeypatch):
    _, asked = trained
    assert asked == {"own", reader_in("own")}
    # batches of several styles
    read_by = []
    build = Batches._read_by_student

    def spied(batches, teachers, rows, dropped):
        found = build(batches, teachers, rows, dropped)
        read_by.append([batches._roles[teacher].student for teacher in teachers])
        whole = batches._data.conditioning(STUDENT, rows, dropped)["encoder_hidden_states"]
        of_base = (found["encoder_hidden_states"] == whole).flatten(1).all(1)
        assert of_base.tolist() == [batches._roles[teacher].student == STUDENT for teacher in teachers]
        return found

    monkeypatch.setattr(Batches, "_read_by_student", spied)
    run(tmp_path / "all", [OWN, ALIKE], styles={"rank": 2, "train": "all", "samples": 8})
    assert [reader_in("own")] * 2 + [STUDENT] * 2 in read_by
    assert adapters_of(load_pipeline(tmp_path / "all"))["own"].text


def test_a_stopped_run_goes_on_to_the_bit(trained, run, tmp_path, monkeypatch):
    step = Trainer._step

    def fail(self, number):
        if number == 1:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(Trainer, "_step", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", [OWN])
    monkeypatch.setattr(Trainer, "_step", step)
    expected = read(load_pipeline(trained[0]), "own")
    assert read(load_pipeline(tmp_path / "stopped" / "untrained"), "own").equal(expected)
    run(tmp_path / "stopped", [OWN], resume=True)
    assert styles_of(tmp_path / "stopped") == styles_of(trained[0])
    # what starts from it reads on by what its styles have
    run(tmp_path / "on", [OWN], start=str(trained[0]))
    assert read(load_pipeline(tmp_path / "on"), "own").equal(expected)


def test_what_is_added_later_leaves_every_bit(trained, recipe, tmp_path):
    try:
        assert main(["add", str(trained[0]), str(recipe([ALIKE])), "--output", str(tmp_path / "more")]) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    before, after = styles_of(trained[0]), styles_of(tmp_path / "more")
    own = [name for name in before if name.startswith("own.")]
    assert len(own) == 2
    assert all(before[name] == after[name] for name in own)


def test_a_lora_that_reads_otherwise_is_carried_whole_and_not_trained(run, models, sd1_folder, tmp_path):
    run(tmp_path / "merged", [LINE], styles={"rank": 4, "samples": 8})
    assert not (tmp_path / "merged" / "training" / "line").exists()
    teacher = open_pipeline(ModelSource(sd1_folder, loras=((models / "line.safetensors", 1.0),)))
    pipe = load_pipeline(tmp_path / "merged")
    assert (read(pipe, "line") - read(teacher)).abs().max() < 5e-3
    dmm.set_style(pipe, "line")
    for name, parameter in teacher.unet.named_parameters():
        torch.testing.assert_close(pipe.unet.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)
    # by fewer ranks than it has the rest is to be learnt
    run(tmp_path / "fewer", [LINE], styles={"rank": 4, "text_encoder_rank": 1, "samples": 8})
    assert (tmp_path / "fewer" / "training" / "line").exists()


def test_a_size_on_disk_is_of_the_text_encoder_too(run, tmp_path):
    styles = {"size": "60KB", "text_encoder_rank": 4, "train": "none", "samples": 8}
    own = adapters_of(load_pipeline(run(tmp_path / "merged", [OWN], styles=styles)))["own"]
    assert own.text
    assert 0.8 * 30_000 < own.num_parameters <= 30_000
    with pytest.raises(UserError, match="of which the differences of biases, norms and text encoders alone take"):
        run(tmp_path / "refused", [OWN], styles={**styles, "size": "2KB"})


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
