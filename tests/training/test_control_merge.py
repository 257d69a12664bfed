"""ControlNets merged: what is learnt are their residuals, each on its own condition; wrong input is one sentence."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline, tiny_unet
from diffusers import ControlNetModel
from PIL import Image
from plugin_helpers import randomize, tiny_controlnet

from dmm.cli import main
from dmm.data.conditions import colours
from dmm.files.yaml import write_yaml
from dmm.models.controlnets import copy_of_encoder
from dmm.models.residuals import Residuals, measured
from dmm.models.side_car import read_side_car
from dmm.training.trainer import Trainer

EDGES, FIELDS = {"name": "edges", "model": "edges"}, {"name": "fields", "model": "fields"}


def near_controlnet(seed):
    """As if trained from the tiny model's encoder."""
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(tiny_pipeline().unet, conditioning_embedding_out_channels=(4, 8))
    return randomize(net, seed, std=0.05)


@pytest.fixture(scope="module")
def models(sd1_folder, tmp_path_factory):
    """Two ControlNets of one model, and captioned images, each with a condition image of its own."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(sd1_folder, folder / "base")
    near_controlnet(1).save_pretrained(folder / "edges")
    near_controlnet(2).save_pretrained(folder / "fields")
    images = folder / "images"
    (images / "seen").mkdir(parents=True)
    lines = []
    for index, caption in enumerate(["a cat", "a dog", "a house", ""]):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        Image.fromarray(255 - pixels).save(images / "seen" / f"{index}.png")
        line = {"file_name": f"{index}.png", "text": caption, "seen": f"seen/{index}.png"}
        lines.append(json.dumps(line) + "\n")
    (images / "metadata.jsonl").write_text("".join(lines))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture
def merge(models):
    """``dmm merge`` of a recipe with changes, in this process; returns its exit status."""

    def run(output, *options, **changes):
        recipe = {
            "kind": "controlnet",
            "base": "base",
            "teachers": [EDGES, FIELDS],
            "data": {"images": "images", "conditions": {"edges": {"make": "edges"}, "fields": "seen"}},
            "size": 16,
            "styles": {"rank": 2, "samples": 8},
            "training": {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
            "checkpoint": {"every": 2, "keep": 1},
            "logging": {"every": 1, "score_error_every": 2},
            **changes,
        }
        path = models / f"{output.name}.yaml"
        path.write_text(write_yaml(recipe))
        try:
            return main(["merge", str(path), "--output", str(output), *options])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def errors_of(*logs):
    rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [row["score_error"] for row in rows if "score_error" in row]


def bytes_of(folder):
    files = [*folder.glob("*.safetensors"), *(folder / "styles").iterdir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("start", ["base", "average", "edges"])
def test_controls_with_adapters_are_learnt_on_shared_weights_that_stay(merge, models, tmp_path, start):
    assert merge(tmp_path / "controls", start=start) == 0
    net = ControlNetModel.from_pretrained(tmp_path / "controls")  # a stock one
    prompts = read_side_car(tmp_path / "controls")
    assert prompts.names == ["edges", "fields"]
    teachers = [ControlNetModel.from_pretrained(models / name) for name in ("edges", "fields")]
    first = net.get_parameter("conv_in.weight")
    if start == "base":
        assert torch.equal(first, tiny_pipeline().unet.get_parameter("conv_in.weight"))
        assert not net.controlnet_mid_block.weight.any()  # with no control it guides nothing
    elif start == "average":
        expected = torch.stack([one.get_parameter("conv_in.weight") for one in teachers]).mean(0)
        assert torch.allclose(first, expected, atol=1e-6)
    else:
        assert torch.equal(first, teachers[0].get_parameter("conv_in.weight"))
    runs = tmp_path / "controls" / "training"
    assert errors_of(runs / "fields" / "log.jsonl")[-1] < 0.9
    assert [one.name for one in prompts.provenance] == ["edges", "fields"]


def test_controls_as_prompts_alone_are_learnt_with_all_weights(merge, tmp_path):
    training = {"steps": 30, "batch_size": 4, "learning_rate": 5e-3, "precision": "fp32"}
    assert merge(tmp_path / "controls", styles={"rank": 0}, training=training, start="average") == 0
    errors = errors_of(tmp_path / "controls" / "log.jsonl")
    assert errors[-1] < errors[0]
    assert read_side_car(tmp_path / "controls").embeddings.shape == (2, 32)


def test_controls_are_learnt_on_what_the_base_paints_and_on_what_it_predicts(merge, tmp_path):
    data = {
        "synthesize": {"prompts": "prompts.txt", "count": 4, "steps": 2},
        "conditions": {"edges": {"make": "edges"}, "fields": {"make": "colours"}},
    }
    assert merge(tmp_path / "controls", data=data, losses={"prediction": 1.0}) == 0
    assert errors_of(tmp_path / "controls" / "training" / "fields" / "log.jsonl")[-1] < 1


def evaluate(folder, output, *options):
    try:
        status = main(["evaluate", str(folder), "--output", str(output), "--num-images", "4", *options])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return json.loads((output / "report.json").read_text())["residual_error"] if status == 0 else status


def test_evaluation_tells_how_far_controls_are_from_their_teachers(merge, models, tmp_path, capsys):
    assert merge(tmp_path / "controls", start="base") == 0
    found = evaluate(tmp_path / "controls", tmp_path / "report")
    assert found["by_control"].keys() == {"edges", "fields"}
    assert 0 < found["mean"]["residuals"] < 0.5
    assert 0 < found["mean"]["prediction"] < 0.5
    # a control baked is that control; what guides nothing is as far off as the teacher's own residuals are large
    assert main(["export", str(tmp_path / "controls"), "--style", "edges", "--output", str(tmp_path / "baked")]) == 0
    found = evaluate(tmp_path / "controls", tmp_path / "same", "--teacher", f"edges={tmp_path / 'baked'}")
    assert found["mean"]["residuals"] == pytest.approx(0, abs=1e-6)
    capsys.readouterr()
    assert evaluate(tmp_path / "controls", tmp_path / "other", "--teacher", f"pose={models / 'edges'}") == 2
    assert "There is no control 'pose'; there are edges, fields" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(merge, tmp_path, monkeypatch, rank):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    styles = {"rank": rank, "samples": 8} if rank else {"rank": 0}
    assert merge(whole, styles=styles) == 0
    step, calls = Trainer._step, []

    def stop(self, number):
        calls.append(number)
        if len(calls) == (7 if rank else 4):
            raise RuntimeError("the power fails")
        step(self, number)

    monkeypatch.setattr(Trainer, "_step", stop)
    with pytest.raises(RuntimeError, match="power"):
        merge(stopped, styles=styles)
    assert not (stopped / "config.json").exists()
    assert merge(stopped, "--resume", styles=styles) == 0
    assert bytes_of(stopped) == bytes_of(whole)
    assert merge(stopped, "--resume", styles=styles) == 0  # has nothing left to do


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"images": "images"}}, "data.conditions does not say what 'edges' is shown"),
        (
            {"data": {"images": "images", "conditions": {"edges": "nothing", "fields": "seen"}}},
            "no metadata.jsonl names its 'nothing'; 4 of the 4 images",
        ),
        (
            {"data": {"images": "images", "conditions": {"edges": {"make": "sketch"}, "fields": "seen"}}},
            "data.conditions.edges: 'sketch' makes no condition images; choose from edges",
        ),
        ({"teachers": [EDGES, {"name": "fields", "model": "base"}]}, "no ControlNet's diffusers folder"),
        ({"teachers": [EDGES, {**FIELDS, "lora": "edges"}]}, "teacher 'fields' is a ControlNet"),
        ({"teachers": [EDGES, {"name": "fields", "model": "wide"}]}, "teacher 'fields': the ControlNet has widths"),
        ({"teachers": [EDGES, {"name": "fields", "model": "other"}]}, "Choose ControlNets of one architecture"),
        ({"losses": {"feature": 0.1}}, "losses.feature is not for ControlNets"),
        ({"kind": "unet"}, "data.conditions is for ControlNets"),
    ],
    ids=["no condition", "no column", "no maker", "no net", "a lora", "another family", "another form", "loss", "kind"],
)
def test_what_is_wrong_is_one_sentence_before_anything_is_written(merge, models, tmp_path, capsys, changes, told):
    wide = ControlNetModel.from_unet(tiny_unet((8, 24)), conditioning_embedding_out_channels=(4, 8))
    wide.save_pretrained(models / "wide")
    other = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(4, 12))
    other.save_pretrained(models / "other")
    assert merge(tmp_path / "controls", **changes) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in message
    assert not (tmp_path / "controls").exists()


def call(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 3, 16), "controlnet_cond": (2, 3, 16, 16)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return net(timestep=torch.tensor([5, 700]), return_dict=False, **inputs)


def test_every_residual_counts_alike_whatever_its_size():
    residuals = Residuals()
    net, stock = measured(tiny_controlnet(), residuals), tiny_controlnet()
    with torch.no_grad():
        down, middle = call(stock)
        blocks = [*down, middle]
        residuals.set_powers([residuals.squares(blocks, None, None, {})])
        vector = call(net)[0]
    assert vector.shape[1] == sum(block[0].numel() for block in blocks)
    assert vector.square().mean() == pytest.approx(1, rel=1e-4)
    sizes = [block[0].numel() for block in blocks]
    means = [part.square().sum() / vector.square().sum() for part in vector.split(sizes, dim=1)]
    assert torch.allclose(torch.stack(means), torch.tensor(1 / len(blocks)), rtol=1e-4)


def test_the_predictions_part_weighs_what_is_asked_beside_all_residuals():
    unet = tiny_unet().requires_grad_(False)
    residuals = Residuals(unet, prediction=0.5)
    net, stock = measured(tiny_controlnet(), residuals), tiny_controlnet()
    nothing = measured(copy_of_encoder([tiny_controlnet()], unet), residuals)
    generator = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    with torch.no_grad():
        down, middle = call(stock)
        asked = ([*down, middle], x_t, torch.tensor([5, 700]), {"encoder_hidden_states": text})
        residuals.set_powers([residuals.squares(*asked)])
        difference = call(net)[0] - call(nothing)[0]
    assert difference.square().mean() == pytest.approx(1.5, rel=1e-3)


def test_a_copy_of_the_encoder_guides_nothing():
    unet = tiny_unet()
    down, middle = call(copy_of_encoder([tiny_controlnet(1), tiny_controlnet(2)], unet))
    assert not any(block.any() for block in (*down, middle))


def test_a_condition_image_is_made_of_what_is_trained_on(models):
    from dmm.data import ImageFolder, prepare_data
    from dmm.data.control_images import Condition

    data = prepare_data(
        ImageFolder(models / "images"),
        tiny_pipeline(),
        {},
        size=16,
        conditions={"fields": Condition(make="colours"), "seen": Condition(column="seen")},
        show_progress=False,
    )
    rows = torch.tensor([2, 0, 1])
    found = data.shown(rows, ["seen", "fields", "seen"])["controlnet_cond"]
    assert found.shape == (3, 3, 16, 16)
    assert (found.min() >= 0, found.max() <= 1) == (True, True)

    def image(folder, row):
        from PIL import ImageOps

        return ImageOps.fit(Image.open(folder / f"{row}.png"), (16, 16), Image.Resampling.LANCZOS)

    for index, expected in ((0, image(models / "images" / "seen", 2)), (1, colours(image(models / "images", 0)))):
        pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
        assert torch.equal(found[index], pixels)
