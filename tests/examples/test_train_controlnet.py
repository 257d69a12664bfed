"""The small ControlNets' example script: what it trains is small, and what it leaves is stock."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import ControlNetModel
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))
from train_controlnet import COPIED, new_net, tensor, unload


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def test_a_picture_becomes_a_tensor_of_its_shape():
    assert tensor(Image.new("RGB", (4, 2), (255, 0, 51))).shape == (3, 2, 4)
    assert tensor(Image.new("RGB", (4, 2), (255, 0, 51)))[:, 0, 0].tolist() == [1, 0, np.float32(0.2)]


def test_of_the_copied_encoder_only_low_rank_changes_are_trained(unet):
    net = new_net(unet, rank=2)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained if name.split(".")[0] in COPIED)
    assert {name.split(".")[0] for name in trained} >= {"controlnet_cond_embedding", "controlnet_mid_block"}


def test_what_is_left_is_a_stock_controlnet_with_the_changes_in_its_weights(unet, tmp_path):
    net = new_net(unet, rank=2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    x, text, condition = torch.ones(1, 4, 8, 8), torch.ones(1, 3, 16), torch.ones(1, 3, 32, 32)
    expected = net(x, 5, text, controlnet_cond=condition, return_dict=False)[1]
    unload(net).save_pretrained(tmp_path)
    found = ControlNetModel.from_pretrained(tmp_path)(x, 5, text, controlnet_cond=condition, return_dict=False)[1]
    assert torch.allclose(found, expected, atol=1e-5)
    weight, before = (one.get_parameter("conv_in.weight").flatten(1) for one in (net, unet))
    assert torch.linalg.matrix_rank(weight - before) == 2
