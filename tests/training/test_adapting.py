"""Merges whose styles are adapters: what one style is hangs on no other, and a run goes on to the bit."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline
from helpers import same_weights
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

import dmm
from dmm.cli import main
from dmm.families.sd1 import SD1
from dmm.files.runs import find_run
from dmm.files.yaml import write_yaml
from dmm.formats.lora import save_kohya_lora
from dmm.formats.original_layout import original_names
from dmm.models.styles import styled_port
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.styled import stock_twin
from dmm.training.preview import find_preview, open_preview
from dmm.training.trainer import Trainer


@pytest.fixture(scope="module")
def models(sd1_folder, tmp_path_factory):
    """Teachers near the base, as fine-tunes are; a LoRA on it; and captioned pictures."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (1, 2, 3):
        pipe, generator = tiny_pipeline(), torch.Generator().manual_seed(seed)
        for parameter in pipe.unet.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        pipe.save_pretrained(folder / f"teacher-{seed}")
    adapted = tiny_pipeline()
    torch.manual_seed(3)
    adapted.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "conv1"]))
    save_kohya_lora(folder / "lora.safetensors", {"unet": adapted.unet}, SD1)
    names = original_names({"unet": tiny_pipeline().unet}, SD1)["unet"]
    spelled = {name: theirs.removeprefix("model.diffusion_model.") for name, theirs in names.items()}
    flat = {
        f"lora_unet_{ours.removesuffix('.weight').replace('.', '_')}": (
            f"lora_unet_{theirs.removesuffix('.weight').replace('.', '_')}"
        )
        for ours, theirs in spelled.items()
        if ours.endswith(".weight")
    }
    renamed = {
        f"{flat[name.split('.')[0]]}.{name.split('.', 1)[1]}": tensor
        for name, tensor in load_file(folder / "lora.safetensors").items()
    }
    save_file(renamed, folder / "original.safetensors")
    images = folder / "images"
    images.mkdir()
    lines = []
    for index, caption in enumerate(["a cat", "a dog", "a house", ""]):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    (images / "metadata.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(autouse=True)
def fresh_process():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


INK, PHOTO = {"name": "ink", "model": "teacher-1"}, {"name": "photo", "model": "teacher-2"}
LINE = {"name": "line", "lora": "lora.safetensors", "lora_scale": 0.5}


@pytest.fixture
def run(models, sd1_folder):
    """A dmm command of a recipe, in this process; returns its exit status."""

    def run(command, output, teachers, *options, **changes):
        recipe = {
            "base": str(sd1_folder),
            "teachers": teachers,
            "data": {"images": "images"},
            "size": 16,
            "styles": {"rank": 2, "samples": 8},
            "training": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
            "losses": {"feature": 0.1},
            "checkpoint": {"every": 2, "keep": 1},
            "logging": {"every": 1, "sample_every": 4, "sample_steps": 2, "score_error_every": 2},
            **changes,
        }
        path = models / f"{output.name}.yaml"
        path.write_text(write_yaml(recipe))
        try:
            return main([*command, str(path), "--output", str(output), *options])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def bytes_of(folder, *, of=None):
    """The result's files, those of some styles alone where they are named."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("unet", "vae", "text_encoder", "styles")
        for path in (folder / part).iterdir()
    }
    if of is not None:
        files = {name: one for name, one in files.items() if name.startswith(tuple(f"styles/{style}." for style in of))}
    return files


def log_of(folder, style):
    lines = (folder / "training" / style / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def adapters_of(pipe):
    return styled_port(pipe.unet).style_prompts.adapters


def is_same(one, other):
    parts = [(part.up, part.down) for part in one.factors.values()]
    others = [(part.up, part.down) for part in other.factors.values()]
    tensors = [tensor for part in parts for tensor in part] + list(one.offsets.values())
    return all(map(torch.equal, tensors, [*(tensor for part in others for tensor in part), *other.offsets.values()]))


def test_a_merge_with_adapters_trains_each_style_on_the_bases_own_weights(run, tmp_path):
    assert run(["merge"], tmp_path / "merged", [INK, PHOTO]) == 0
    pipe = dmm.load_pipeline(tmp_path / "merged")
    assert dmm.style_names(pipe) == ["ink", "photo"]
    assert same_weights(pipe, tiny_pipeline())
    for style in ("ink", "photo"):
        errors = [entry["score_error"] for entry in log_of(tmp_path / "merged", style) if "score_error" in entry]
        assert errors[-1] < 1
    assert not {"untrained", "calibration"} & {path.name for path in (tmp_path / "merged").iterdir()}
    assert list((tmp_path / "merged" / "samples").iterdir())


def test_without_training_a_merge_is_nearer_to_its_teachers_the_more_it_may_take(run, models, tmp_path):
    teacher = open_pipeline(ModelSource(models / "teacher-1"))
    moved = []
    for rank in (1, 4, 16):
        folder = tmp_path / str(rank)
        assert run(["merge"], folder, [INK], styles={"rank": rank, "train": "none", "samples": 8}) == 0
        assert not (folder / "training").exists()
        ours = stock_twin(dmm.load_pipeline(folder), "ink")
        with torch.no_grad():
            torch.manual_seed(0)
            x, t, text = torch.randn(8, 4, 8, 8), torch.arange(8) * 100, torch.randn(8, 6, 16)
            said = [one.unet(x, t, encoder_hidden_states=text).sample for one in (ours, teacher)]
        moved.append(float((said[0] - said[1]).square().mean()))
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 0.05 * moved[0]  # 16 is the full rank of most layers


@pytest.mark.parametrize("lora", ["lora.safetensors", "original.safetensors"])
def test_a_lora_teacher_keeps_its_own_factors_where_they_fit(run, models, sd1_folder, tmp_path, lora):
    line = {**LINE, "lora": lora}
    assert run(["merge"], tmp_path / "merged", [line, INK], styles={"rank": 4, "samples": 8}) == 0
    assert not (tmp_path / "merged" / "training" / "line").exists()
    ours = stock_twin(dmm.load_pipeline(tmp_path / "merged"), "line")
    teacher = open_pipeline(ModelSource(sd1_folder, loras=((models / "lora.safetensors", 0.5),)))
    for name, parameter in teacher.unet.named_parameters():
        torch.testing.assert_close(ours.unet.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)


def test_a_stopped_run_goes_on_to_the_bit(run, tmp_path, monkeypatch):
    assert run(["merge"], tmp_path / "whole", [INK, PHOTO]) == 0
    step = Trainer._step
    for at in ((1, 2), (5, 3)):  # within the first style; in the second, after a checkpoint
        count = 0

        def fail(self, number, at=at):
            nonlocal count
            count += 1
            if count == at[0] + 1:
                raise KeyboardInterrupt
            step(self, number)

        folder = tmp_path / f"stopped-{at[0]}"
        monkeypatch.setattr(Trainer, "_step", fail)
        assert run(["merge"], folder, [INK, PHOTO]) == 130
        monkeypatch.setattr(Trainer, "_step", step)
        untrained = dmm.load_pipeline(folder / "untrained")  # a merge is there already
        assert dmm.style_names(untrained) == ["ink", "photo"]
        assert run(["merge"], folder, [INK, PHOTO], "--resume") == 0
        assert bytes_of(folder) == bytes_of(tmp_path / "whole")


def test_by_error_a_style_is_what_it_is_without_the_others(run, tmp_path):
    styles = {"error": 0.3, "samples": 8}
    assert run(["merge"], tmp_path / "both", [INK, PHOTO], styles=styles) == 0
    assert run(["merge"], tmp_path / "one", [PHOTO], styles=styles) == 0
    # unlearning: what is left is, to the bit, the merge that never had the teacher
    assert main(["remove", str(tmp_path / "both"), "ink", "--output", str(tmp_path / "left")]) == 0
    assert bytes_of(tmp_path / "left") == bytes_of(tmp_path / "one")


def test_what_is_added_leaves_every_bit_of_what_was(run, tmp_path):
    merged = tmp_path / "merged"
    assert run(["merge"], merged, [INK, PHOTO]) == 0
    third = {"name": "clay", "model": "teacher-3"}
    assert run(["add", str(merged)], tmp_path / "more", [third]) == 0
    assert dmm.style_names(dmm.load_pipeline(tmp_path / "more")) == ["ink", "photo", "clay"]
    assert bytes_of(tmp_path / "more", of=["ink", "photo"]) == bytes_of(merged, of=["ink", "photo"])
    for part in ("unet", "vae", "text_encoder"):
        for path in (merged / part).iterdir():
            assert path.read_bytes() == (tmp_path / "more" / part / path.name).read_bytes()
    assert run(["add", str(merged)], tmp_path / "refused", [third], styles={"rank": 0}) == 2


def test_an_adapter_is_added_to_a_merge_of_style_prompts(run, tmp_path):
    plain = {"styles": {"rank": 0}, "losses": {"feature": 0.1, "adversarial": 0}}
    assert run(["merge"], tmp_path / "prompts", [INK, PHOTO], **plain) == 0
    assert run(["add", str(tmp_path / "prompts")], tmp_path / "more", [{"name": "clay", "model": "teacher-3"}]) == 0
    pipe = dmm.load_pipeline(tmp_path / "more")
    before = dmm.load_pipeline(tmp_path / "prompts")
    port, earlier = styled_port(pipe.unet), styled_port(before.unet)
    assert list(port.style_prompts.adapters) == ["clay"]
    assert torch.equal(port.style_prompts.embeddings[:2], earlier.style_prompts.embeddings)
    assert same_weights(stock_twin(pipe), stock_twin(before))


def test_shared_weights_are_trained_too_where_asked(run, tmp_path):
    styles = {"rank": 2, "train": "all", "samples": 8}
    assert run(["merge"], tmp_path / "merged", [INK, PHOTO], styles=styles) == 0
    pipe = dmm.load_pipeline(tmp_path / "merged")
    assert not same_weights(pipe, tiny_pipeline())
    assert sorted(styled_port(pipe.unet).style_prompts.adapters) == ["ink", "photo"]


def test_a_run_under_way_paints_with_what_it_has(run, tmp_path, monkeypatch, capsys):
    folder, step = tmp_path / "stopped", Trainer._step

    def fail(self, number):
        if self.folder.name == "photo" and number == 3:
            raise KeyboardInterrupt
        step(self, number)

    monkeypatch.setattr(Trainer, "_step", fail)
    assert run(["merge"], folder, [INK, PHOTO]) == 130
    monkeypatch.setattr(Trainer, "_step", step)
    assert find_run(folder).told() == "step 2 of 4 of the style 'photo' is saved"
    found = find_preview(folder)
    assert (found.styles, found.checkpoint.parent.parent.name) == (["ink", "photo"], "photo")
    preview, untrained = open_preview(found), adapters_of(dmm.load_pipeline(folder / "untrained"))["photo"]
    assert main(["generate", str(folder), "a cat", "--output", str(tmp_path / "cat.png")]) == 2
    assert "`dmm generate --from-checkpoint` paints with what is saved" in capsys.readouterr().err
    capsys.readouterr()
    assert run(["merge"], folder, [INK, PHOTO], "--resume") == 0
    said = capsys.readouterr().out
    assert "goes on:     where the style 'photo' has 2 steps\n" in said
    (log,) = re.findall(r"curves: +(\S+);", said)
    assert {path.parent.name for path in Path("/").glob(log.lstrip("/"))} == {"ink", "photo"}
    ink, photo = (adapters_of(preview)[style] for style in ("ink", "photo"))
    # the one was done by then, the other half
    assert is_same(ink, adapters_of(dmm.load_pipeline(folder))["ink"])
    assert not is_same(photo, adapters_of(dmm.load_pipeline(folder))["photo"])
    assert not is_same(photo, untrained)
    finished = open_preview(find_preview(folder))
    for style in ("ink", "photo"):
        assert is_same(adapters_of(finished)[style], adapters_of(dmm.load_pipeline(folder))[style])


def test_more_steps_go_on_with_a_finished_run(run, tmp_path, capsys):
    training = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32", "lr_schedule": "constant"}
    assert run(["merge"], tmp_path / "whole", [INK], training={**training, "steps": 6}) == 0
    assert run(["merge"], tmp_path / "more", [INK], training=training) == 0
    assert run(["merge"], tmp_path / "more", [INK], "--resume", training={**training, "steps": 6}) == 0
    assert bytes_of(tmp_path / "more") == bytes_of(tmp_path / "whole")
    assert run(["merge"], tmp_path / "more", [INK], "--resume", training={**training, "steps": 2}) == 2
    assert "has trained 6 steps already, more than the recipe's training.steps of 2" in capsys.readouterr().err


KILLED = """
import os, signal, sys
import torch
from dmm.cli import main
from dmm.training import adapting
torch.set_num_threads(1)
write = adapting.write_calibrated
def die(found, path):
    if path.stem == "photo":
        os.kill(os.getpid(), signal.SIGKILL)
    write(found, path)
adapting.write_calibrated = die
main(sys.argv[1:])
"""


def test_killed_while_it_calibrates_it_goes_on_to_the_bit(run, models, tmp_path):
    folder = tmp_path / "killed"
    assert run(["merge"], tmp_path / "whole", [INK, PHOTO]) == 0
    recipe = models / "killed.yaml"
    recipe.write_text((models / "whole.yaml").read_text())
    command = [sys.executable, "-c", KILLED, "merge", str(recipe), "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    assert [path.stem for path in (folder / "calibration").iterdir()] == ["ink"]
    assert not (folder / "untrained").exists()
    assert run(["merge"], folder, [INK, PHOTO], "--resume") == 0
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")


def test_two_processes_train_as_one(run, models, tmp_path):
    assert run(["merge"], tmp_path / "one", [INK, PHOTO]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dmm"]
    command = ["merge", str(models / "one.yaml"), "--output", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    for style in ("ink", "photo"):
        for one, two in zip(*(log_of(tmp_path / name, style) for name in ("one", "two")), strict=True):
            assert two["score"] == pytest.approx(one["score"], rel=1e-3)
