"""SDXL in half precision: it paints, and its VAE, which overflows there, never computes in float16."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import tiny_sdxl

import dmm
from dmm.models.styles import StylePrompts
from dmm.pipeline.plugins import Start, add_plugins
from dmm.pipeline.regions import Region, paint_regions
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import add_styles

SIZE = {"width": 16, "height": 16, "steps": 2}


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def half(request):
    """A merged SDXL in half precision, and the dtypes that its VAE and its UNet are given while it paints."""
    pipe = tiny_sdxl()
    torch.manual_seed(1)
    prompts = StylePrompts(["ink", "photo"], dim=32)
    torch.nn.init.normal_(prompts.linear_2.weight, std=2)
    add_styles(pipe, prompts)
    pipe.to(dtype=request.param)
    dmm.set_style(pipe, "ink")
    seen = {"vae": [], "unet": []}
    for name, layer in (
        ("vae", pipe.vae.encoder.conv_in),
        ("vae", pipe.vae.decoder.conv_in),
        ("unet", pipe.unet.conv_in),
    ):
        layer.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0].dtype))
    return pipe, request.param, seen


def painted(pipe):
    return next(sample(pipe, ["a cat"], [0], **SIZE))


def from_an_image(pipe, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    guided, inputs = add_plugins(pipe, start=Start(tmp_path / "red.png", strength=0.8))
    return next(sample(guided, ["a cat"], [0], inputs=lambda count: inputs(count, (16, 16)), **SIZE))


def by_regions(pipe):
    whole = Region((0, 0, 8, 16), "ink"), Region((8, 0, 16, 16), "photo")
    return paint_regions(pipe, list(whole), "a cat", **SIZE)


@pytest.mark.parametrize("way", [painted, from_an_image, by_regions], ids=lambda way: way.__name__)
def test_it_paints_and_its_vae_never_computes_in_float16(half, way, tmp_path):
    pipe, dtype, seen = half
    picture = way(pipe, tmp_path) if way is from_an_image else way(pipe)
    assert np.asarray(picture).std() > 1
    assert set(seen["unet"]) == {dtype}
    assert seen["vae"]
    assert torch.float16 not in seen["vae"]
