"""A merge becomes a stock model that paints in few steps, in its styles; a run goes on to the bit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import STYLE_NAMES, tiny_adapted, tiny_pipeline
from diffusers import LCMScheduler, StableDiffusionPipeline
from helpers import paint
from safetensors.torch import load_file
from tiny_families import tiny_sd3

import dmm
from dmm.cli import main
from dmm.data import TrainingData
from dmm.data.training import reader_in
from dmm.errors import UserError
from dmm.files.few_steps import FewSteps, read_few_steps
from dmm.files.yaml import write_yaml
from dmm.formats.tensors import read_header
from dmm.models.few_step import fast_layers
from dmm.models.styles import StylePrompts, styled_port
from dmm.models.text_adapters import text_difference
from dmm.pipeline.export import export_style
from dmm.pipeline.removal import remove_style
from dmm.pipeline.styled import add_styles
from dmm.training.trainer import Trainer

UNET = "unet/diffusion_pytorch_model.safetensors"
FAST = "fast.safetensors"


@pytest.fixture(scope="module")
def accelerate(tmp_path_factory):
    """``dmm accelerate`` of a model by a recipe with changes, in this process; returns its exit status."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

        def run(model, output, *options, **changes):
            training = {"steps": 4, "batch_size": 6, "learning_rate": 1e-3, "precision": "fp32"}
            recipe = {
                "data": {"synthesize": {"prompts": "prompts.txt", "count": 2, "steps": 2}},
                "size": 16,
                "guidance": 2,
                "method": "splam",
                "checkpoint": {"every": 2, "keep": 2},
                "logging": {"every": 1},
                **changes,
                "training": {**training, **changes.get("training", {})},
            }
            path = folder / f"{output.name}.yaml"
            path.write_text(write_yaml(recipe))
            try:
                return main(["accelerate", str(model), str(path), "--output", str(output), *options])
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)

        yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(accelerate, merged_adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert accelerate(merged_adapters, folder) == 0
    return folder


@pytest.fixture(scope="module")
def lora(accelerate, merged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    assert accelerate(merged, folder, rank=2, training={"learning_rate": 1e-2}) == 0
    return folder / FAST


def test_the_result_is_a_stock_pipeline_with_the_same_styles(finished, merged_adapters):
    plain = StableDiffusionPipeline.from_pretrained(finished)
    assert isinstance(plain.scheduler, LCMScheduler)
    assert plain.scheduler.config.original_inference_steps == 50
    assert plain.unet.config.time_cond_proj_dim is None
    before, after = (load_file(folder / UNET) for folder in (merged_adapters, finished))
    assert before.keys() == after.keys()
    assert all(
        not torch.equal(before[name], after[name]) for name in ("conv_in.weight", "time_embedding.linear_1.bias")
    )
    pipe = dmm.load_pipeline(finished)
    assert dmm.style_names(pipe) == STYLE_NAMES
    for name in STYLE_NAMES:
        kept, own = (load_file(folder / "styles" / f"{name}.safetensors") for folder in (merged_adapters, finished))
        assert kept.keys() == own.keys()
        assert all(torch.equal(kept[key], own[key]) for key in kept)
    dmm.set_style(pipe, {"ink": 0.5, "clay": 0.5})
    assert paint(pipe, guidance_scale=1.0, steps=2).shape == (1, 16, 16, 3)
    assert read_few_steps(finished) == FewSteps("splam", (2.0, 2.0), 20)
    log = [json.loads(line) for line in (finished / "acceleration" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert {f"consistency/{name}" for name in STYLE_NAMES} < log[0].keys()


def test_captions_are_read_as_each_style_reads_them(accelerate, tmp_path, monkeypatch):
    pipe, asked, conditioning = tiny_adapted(), set(), TrainingData.conditioning
    adapters = styled_port(pipe.unet).style_prompts.adapters
    adapters["ink"] = replace(adapters["ink"], text=text_difference(tiny_pipeline(seed=5), pipe, 2))
    dmm.save_pipeline(pipe, tmp_path / "merged")

    def spied(data, encoder, rows, dropped):
        asked.add(encoder)
        return conditioning(data, encoder, rows, dropped)

    monkeypatch.setattr(TrainingData, "conditioning", spied)
    assert accelerate(tmp_path / "merged", tmp_path / "fast", training={"steps": 1}) == 0
    assert asked == {"student", reader_in("ink")}
    for file in (tmp_path / "merged" / "styles").glob("ink.*"):
        kept, own = load_file(file), load_file(tmp_path / "fast" / "styles" / file.name)
        assert kept.keys() == own.keys()
        assert all(torch.equal(kept[key], own[key]) for key in kept)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(accelerate, finished, merged_adapters, tmp_path, capsys):
    class Killed(BaseException):
        pass

    def die(trainer, number, step=Trainer._step):
        if number == 3:
            raise Killed
        step(trainer, number)

    output = tmp_path / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", die)
        with pytest.raises(Killed):
            accelerate(merged_adapters, output)
    # 50 points, and an average that follows in 20 steps
    assert "what is learnt at the path's end reaches its beginning in about 1,000 steps" in capsys.readouterr().out
    assert main(["generate", str(output), "a cat"]) == 2
    assert "is a few-step distillation that has not ended: step 2 of 4 is saved" in capsys.readouterr().err
    assert accelerate(merged_adapters, output) == 2
    assert "holds a few-step distillation that has not ended: step 2 of 4 is saved" in capsys.readouterr().err
    assert accelerate(merged_adapters, output, "--resume") == 0
    assert (output / UNET).read_bytes() == (finished / UNET).read_bytes()
    assert accelerate(merged_adapters, output, "--resume") == 0
    assert "is finished already" in capsys.readouterr().out
    assert accelerate(merged_adapters, output, "--resume", guidance=3) == 2
    assert "began with guidance.0 2.0, the recipe now says 3.0" in capsys.readouterr().err
    assert accelerate(merged_adapters, output) == 2
    assert "holds a few-step distillation. Name another output" in capsys.readouterr().err


def test_micro_batches_and_checkpointing_change_nothing_but_rounding(accelerate, finished, merged_adapters, tmp_path):
    cut = {"micro_batch_size": 1, "gradient_checkpointing": True}
    assert accelerate(merged_adapters, tmp_path / "cut", training=cut) == 0
    whole, parts = (load_file(folder / UNET) for folder in (finished, tmp_path / "cut"))
    start = load_file(merged_adapters / UNET)
    name = "conv_in.weight"
    assert (whole[name] - parts[name]).abs().max() < 0.1 * (whole[name] - start[name]).abs().max()


def test_a_lora_is_in_kohyas_layout_and_goes_on_any_style(lora, merged):
    pipe = dmm.load_pipeline(merged)
    header = read_header(lora)
    layers = {name.rpartition(".lora_")[0] for name in header.tensors if ".lora_" in name}
    assert layers == {"lora_unet_" + name.removesuffix(".weight").replace(".", "_") for name in fast_layers(pipe.unet)}
    assert json.loads(header.metadata["dmm.few_steps"])["rank"] == 2
    assert not (lora.parent / "model_index.json").exists()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    for style in ("ink", {"photo": 0.4, "clay": 0.6}):
        dmm.set_style(pipe, style)
        without = paint(pipe, guidance_scale=1.0)
        pipe.load_lora_weights(lora)
        assert (paint(pipe, guidance_scale=1.0) != without).any()
        pipe.unload_lora_weights()
        assert (paint(pipe, guidance_scale=1.0) == without).all()


def in_few_steps(pipe):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return paint(pipe, guidance_scale=1.0)


def test_plain_diffusers_paints_with_the_lora_as_we_do(lora, merged, tmp_path):
    ours = dmm.load_pipeline(merged)
    dmm.set_style(ours, "ink")
    ours.load_lora_weights(lora)
    export_style(dmm.load_pipeline(merged), "ink", tmp_path / "ink")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "ink")
    without = in_few_steps(plain)
    plain.load_lora_weights(lora)
    assert abs(in_few_steps(plain) - in_few_steps(ours)).max() <= 1
    assert abs(in_few_steps(plain) - without).max() > 1


def test_the_lora_takes_part_in_a_style_that_is_added_later(lora, merged, sd1_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    recipe = {
        "teachers": [{"name": "later", "model": str(sd1_folder)}],
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 1, "steps": 1}},
        "size": 16,
        "training": {"steps": 1, "batch_size": 4, "precision": "fp32"},
    }
    (tmp_path / "more.yaml").write_text(write_yaml(recipe))
    assert main(["add", str(merged), str(tmp_path / "more.yaml"), "--output", str(tmp_path / "more")]) == 0
    pipe = dmm.load_pipeline(tmp_path / "more")
    for style in ("later", {"later": 0.5, "ink": 0.5}):
        dmm.set_style(pipe, style)
        without = in_few_steps(pipe)
        pipe.load_lora_weights(lora)
        assert abs(in_few_steps(pipe) - without).max() > 1
        pipe.unload_lora_weights()
    before = dmm.load_pipeline(merged)
    for one in (before, pipe):
        one.unload_lora_weights()
        dmm.set_style(one, "ink")
        one.load_lora_weights(lora)
    assert (in_few_steps(before) == in_few_steps(pipe)).all()  # what was there before paints as it did


def test_what_is_accelerated_bakes_and_takes_a_lora(finished, lora, tmp_path):
    for style in ("ink", {"photo": 0.4, "clay": 0.6}):
        pipe = dmm.load_pipeline(finished)
        dmm.set_style(pipe, style)
        prompted = in_few_steps(pipe)
        export_style(pipe, style, tmp_path / "baked", overwrite=True)
        plain = StableDiffusionPipeline.from_pretrained(tmp_path / "baked")
        assert isinstance(plain.scheduler, LCMScheduler)
        assert abs(in_few_steps(plain) - prompted).max() <= 1
        pipe.load_lora_weights(lora)
        assert abs(in_few_steps(pipe) - prompted).max() > 1


@pytest.mark.parametrize("method", ["lcm", "splam"])
def test_a_lora_of_a_merge_with_adapters_trains(accelerate, merged_adapters, tmp_path, method):
    changes = {"rank": 1, "method": method, "training": {"steps": 1, "ema_decay": 0.9}}
    assert accelerate(merged_adapters, tmp_path / "lora", **changes) == 0
    assert (tmp_path / "lora" / FAST).is_file()


def test_a_stock_model_is_accelerated_and_keeps_what_it_is_told(accelerate, sd1_folder, tmp_path, capsys):
    output = tmp_path / "stock"
    assert accelerate(sd1_folder, output, method="lcm", guidance=[2, 6], training={"steps": 1}) == 0
    pipe = StableDiffusionPipeline.from_pretrained(output)
    assert pipe.unet.config.time_cond_proj_dim == 256
    assert (paint(pipe, guidance_scale=2.0) != paint(pipe, guidance_scale=6.0)).any()
    assert read_few_steps(output).guidance_scale == 4.0
    add_styles(pipe, StylePrompts(["ink"], dim=32))
    with pytest.raises(UserError, match="told its guidance by a layer that single files have no name for"):
        export_style(pipe, "ink", tmp_path / "ink.safetensors")
    assert accelerate(output, tmp_path / "again") == 2
    assert "was distilled to paint in few steps already" in capsys.readouterr().err


def test_a_style_is_removed_of_an_accelerated_merge(finished, tmp_path):
    remove_style(finished, "photo", tmp_path / "left")
    assert read_few_steps(tmp_path / "left") == read_few_steps(finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"batch_size": 2}}, "training.batch_size is 2, which does not give every process a sample"),
        ({"skip": 600}, "skip is 600, of a model with 1000 timesteps"),
        ({"size": 24, "training": {"precision": "fp16"}}, "training.precision is fp16, which a CPU does not train in"),
    ],
    ids=["batch", "skip", "precision"],
)
def test_what_cannot_be_is_refused_before_anything_is_written(accelerate, merged, tmp_path, capsys, changes, message):
    assert accelerate(merged, tmp_path / "refused", **changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_family_of_rectified_flow_is_refused(accelerate, tmp_path, capsys):
    tiny_sd3().save_pretrained(tmp_path / "flow")
    assert accelerate(tmp_path / "flow", tmp_path / "refused") == 2
    assert "a family that is trained by rectified flow, along which no few-step model" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_what_knows_no_first_step_is_refused(accelerate, tmp_path, capsys):
    pipe = tiny_pipeline()
    pipe.scheduler.register_to_config(rescale_betas_zero_snr=True)
    pipe.save_pretrained(tmp_path / "noise")
    config = tmp_path / "noise" / "scheduler" / "scheduler_config.json"
    settings = {**json.loads(config.read_text()), "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    config.write_text(json.dumps(settings))
    assert accelerate(tmp_path / "noise", tmp_path / "refused") == 2
    assert "predicts epsilon on a schedule that ends in pure noise" in capsys.readouterr().err


def test_nothing_is_added_to_what_paints_in_few_steps(finished, sd1_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    recipe = {
        "teachers": [{"name": "new", "model": str(sd1_folder)}],
        "data": {"synthesize": {"prompts": "prompts.txt", "count": 1}},
        "training": {"precision": "fp32"},
    }
    (tmp_path / "more.yaml").write_text(write_yaml(recipe))
    assert main(["add", str(finished), str(tmp_path / "more.yaml"), "--output", str(tmp_path / "more")]) == 2
    assert "Add to the merge that it was made of, and accelerate that" in capsys.readouterr().err


def test_overwriting_leaves_nothing_of_what_was_there(accelerate, merged, finished, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    assert accelerate(merged, folder, "--overwrite", rank=1, training={"steps": 1}) == 0
    assert {path.name for path in folder.iterdir()} == {"acceleration", FAST}
