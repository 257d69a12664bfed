"""Merged ControlNets: a control is chosen as a style is, baked it is the same, and without one the net is stock."""

import numpy as np
import pytest
import torch
from adapter_helpers import some_adapter
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from plugin_helpers import tiny_controlnet
from safetensors.torch import load_file

import dmm
from dmm.cli import main
from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.files.parameters import read_parameters
from dmm.models.controlnets import write_controlnet
from dmm.models.styles import StylePrompts
from dmm.pipeline.controls import export_control, temporary_control

NAMES = ["edges", "depth"]


@pytest.fixture(scope="module", params=["prompts", "adapters"])
def folder(request, tmp_path_factory):
    """A merged ControlNet whose controls differ far more than rounding does; read only."""
    net = tiny_controlnet()
    torch.manual_seed(1)
    prompts = StylePrompts(NAMES, dim=32 if request.param == "prompts" else 0)
    if request.param == "prompts":
        torch.nn.init.normal_(prompts.linear_2.weight, std=2)
    else:
        prompts.adapters = {name: some_adapter(net, 1 + i, rank=2 + i) for i, name in enumerate(NAMES)}
    folder = tmp_path_factory.mktemp("controls") / "controls"
    folder.mkdir()
    write_controlnet(net, prompts, folder, SD1)
    return folder


@pytest.fixture
def net(folder):
    return dmm.load_controls(folder)


INPUTS = {
    "sample": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "encoder_hidden_states": torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1)),
    "controlnet_cond": torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
}


@torch.no_grad()
def say(net, rows=slice(None), **more):
    inputs = {name: value[rows] for name, value in INPUTS.items()}
    down, middle = net(timestep=500, return_dict=False, **inputs, **more)
    return torch.cat([block.flatten(1) for block in (*down, middle)], dim=1)


def test_no_control_is_the_stock_net_and_plain_diffusers_opens_the_folder(net, folder):
    stock = say(ControlNetModel.from_pretrained(folder))
    assert torch.equal(say(net), stock)
    dmm.set_control(net, "depth")
    assert (say(net) - stock).abs().max() > 0.01
    dmm.set_control(net, None)
    assert torch.equal(say(net), stock)


@pytest.mark.parametrize("control", ["edges", {"edges": 0.3, "depth": 0.7}], ids=["one", "mix"])
def test_baked_is_chosen(net, control, tmp_path):
    with temporary_control(net, control):
        chosen = say(net)
    export_control(net, control, tmp_path / "one")
    assert torch.allclose(say(ControlNetModel.from_pretrained(tmp_path / "one")), chosen, atol=2e-5)
    export_control(net, control, tmp_path / "half.safetensors", dtype=torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    assert half.keys() == ControlNetModel.from_pretrained(tmp_path / "one").state_dict().keys()
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_one_an_image_under_guidance_is_each_alone(net):
    dmm.set_control(net, ["edges", {"edges": 0.5, "depth": 0.5}])
    together = say(net)  # two images, twice: guidance's halves
    for row, control in enumerate(["edges", {"edges": 0.5, "depth": 0.5}]):
        dmm.set_control(net, control)
        assert torch.allclose(together[row::2], say(net, slice(row, None, 2)), atol=2e-5)


def test_a_conditioning_scale_scales_what_a_control_gives(net):
    dmm.set_control(net, "depth")
    assert torch.allclose(say(net, conditioning_scale=0.25), 0.25 * say(net))
    assert not say(net, conditioning_scale=0.0).any()


def test_saved_and_loaded_is_the_same(net, folder, tmp_path):
    dmm.set_control(net, "edges")
    before = say(net)
    dmm.save_controls(net, tmp_path / "copy")
    for file in (file for file in folder.rglob("*") if file.suffix == ".safetensors"):
        assert (tmp_path / "copy" / file.relative_to(folder)).read_bytes() == file.read_bytes()
    copy = dmm.load_controls(tmp_path / "copy")
    assert dmm.control_names(copy) == NAMES
    dmm.set_control(copy, "edges")
    assert torch.equal(say(copy), before)
    with pytest.warns(UserWarning, match="without the controls"):
        net.save_pretrained(tmp_path / "shared")


def test_every_style_goes_with_every_control_in_a_stock_pipeline(styled, net):
    guided = StableDiffusionControlNetPipeline.from_pipe(styled, controlnet=net)
    guided.set_progress_bar_config(disable=True)
    image = Image.effect_noise((16, 16), 90).convert("RGB")

    def paint(style, control, scale=1.0):
        dmm.set_style(guided, style)
        dmm.set_control(guided, control)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        settings = {"num_inference_steps": 2, "latents": noise, "output_type": "latent", "guidance_scale": 3.0}
        return guided("a cat", image=image, controlnet_conditioning_scale=scale, **settings).images

    painted = [paint(style, control) for style in ("ink", "photo") for control in ("edges", "depth", None)]
    for i, one in enumerate(painted):
        for other in painted[:i]:
            assert (one - other).abs().max() > 1e-3
    # at no strength there is no control, whichever is chosen
    assert torch.equal(paint("ink", "edges", 0.0), paint("ink", "depth", 0.0))


def test_what_has_no_controls_is_told(styled, net):
    with pytest.raises(UserError, match="no merged ControlNet here"):
        dmm.set_control(styled, "edges")
    with pytest.raises(UserError, match="edges"):
        dmm.set_control(net, "pose")
    with pytest.raises(UserError, match="sum to"):
        dmm.set_control(net, {"edges": 0.5})


def test_a_stock_net_is_no_merged_one(tmp_path):
    tiny_controlnet().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a stock ControlNet, which has one control only"):
        dmm.load_controls(tmp_path)


@pytest.fixture
def files(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("edges", "depth")):
        torch.manual_seed(seed)
        Image.fromarray(torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()).save(f"{name}.png")
    return tmp_path


def generate(merged, *options):
    common = ["--steps", "2", "--device", "cpu", "--output", "out.png", "--overwrite"]
    return main(["generate", str(merged), "a cat", *options, *common])


def test_generate_follows_a_control_and_several_by_turns(files, folder, merged, capsys):
    net = ["--controlnet", str(folder)]
    alone = {}
    for name in NAMES:
        assert generate(merged, "--style", "ink", *net, "--control", name, "--control-image", f"{name}.png") == 0
        alone[name] = np.asarray(Image.open("out.png"))
        assert read_parameters("out.png")["Control"] == name
    each = [option for name in NAMES for option in ("--control", name, "--control-image", f"{name}.png")]
    folder_of_files = ["--styles", "all", *net, *each, "--steps", "2", "--device", "cpu", "--output", "all/"]
    assert main(["generate", str(merged), "a cat", *folder_of_files]) == 0
    for name in NAMES:
        found = np.asarray(Image.open(f"all/{name}-0001-seed0-ink.png"), dtype=int)
        assert abs(found - alone[name]).max() <= 2
    assert len(list((files / "all").iterdir())) == 6
    assert generate(merged, "--styles", "all", *net, *each) == 0  # a grid: the controls down, what each follows first


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--control-image", "edges.png"], "has several controls: choose with --control from edges, depth"),
        (["--control", "pose", "--control-image", "edges.png"], "pose"),
        (["--control", "edges", "--control", "depth", "--control-image", "edges.png"], "no merged --controlnet"),
        (["--control", "edges"], "needs a --control-image"),
    ],
    ids=["none", "unknown", "too many", "no image"],
)
def test_generate_tells_of_a_wrong_control_at_once(files, folder, merged, capsys, options, told):
    assert generate(merged, "--controlnet", str(folder), *options) == 2
    assert told in capsys.readouterr().err


def test_export_writes_a_stock_controlnet(files, folder, net):
    assert main(["export", str(folder), "--style", "depth", "--output", "depth"]) == 0
    dmm.set_control(net, "depth")
    assert torch.allclose(say(ControlNetModel.from_pretrained("depth")), say(net), atol=2e-5)


def test_controls_move_with_the_net(net):
    dmm.set_control(net, "edges")
    before = say(net)
    assert torch.allclose(say(net.to(torch.float64).to(torch.float32)), before, atol=1e-5)
