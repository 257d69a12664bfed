"""The embedded ControlNets are whole, stock, and made anew where a file of theirs is damaged."""

import importlib

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image

from dmm.demo import controls, experts
from dmm.errors import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_they_are_stock_controlnets_near_the_bases_encoder(cache):
    paths = controls(cache=cache)
    assert list(paths) == ["edges", "colours", "silhouette"]
    base = UNet2DConditionModel.from_pretrained(experts(cache=cache)["base"] / "unet")
    for path in paths.values():
        net = ControlNetModel.from_pretrained(path)
        for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight"):
            difference = (net.get_parameter(name) - base.get_parameter(name)).flatten(1)
            values = torch.linalg.svdvals(difference)
            assert values[16] < 0.01 * values[0]  # of rank 16, but for rounding
        # and what is no weight of a layer is the base's own
        assert torch.equal(net.get_parameter("conv_in.bias"), base.get_parameter("conv_in.bias"))
        assert net.controlnet_mid_block.weight.any()
        with Image.open(path / "example.png") as image:
            assert image.size == (32, 32)


def test_a_damaged_copy_is_made_again_and_a_damaged_original_told(cache, tmp_path, monkeypatch):
    file = controls(cache=cache)["edges"] / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert controls(cache=cache)["edges"] == file.parent
    assert file.read_bytes() == whole
    home = importlib.import_module("dmm.demo.controls")  # by attribute it is the function
    for stored in home.STORED.iterdir():
        (tmp_path / stored.name).write_bytes(stored.read_bytes())
    (tmp_path / "edges.safetensors").write_bytes(b"")
    monkeypatch.setattr(home, "STORED", tmp_path)
    with pytest.raises(UserError, match="its sha256 is not the recorded one"):
        controls(cache=tmp_path / "cache")
