"""An export of a merge with adapters paints, in plain diffusers, what the merged model paints in that style."""

import pytest
import torch
from conftest import STYLE_NAMES as NAMES
from conftest import tiny_pipeline
from diffusers import StableDiffusionPipeline
from helpers import paint, same_weights
from safetensors.torch import load_file, save_file

from dmm.pipeline.export import export_all, export_style
from dmm.pipeline.styled import set_style

MIX = {"ink": 0.7, "photo": 0.3}


def plain_file(file, config):
    return StableDiffusionPipeline.from_single_file(str(file), config=str(config), safety_checker=None)


@pytest.mark.parametrize("style", [*NAMES, MIX], ids=str)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_adapter_or_a_mix_of_them_is_in_the_stock_weights(adapted, sd1_folder, tmp_path, style, kind):
    if kind == "folder":
        export_style(adapted, style, tmp_path / "out")
        exported = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    else:
        export_style(adapted, style, tmp_path / "out.safetensors")
        exported = plain_file(tmp_path / "out.safetensors", sd1_folder)
    assert type(exported.unet.time_embedding).__name__ == "TimestepEmbedding"
    set_style(adapted, style)
    assert abs(paint(exported) - paint(adapted)).max() <= 2
    set_style(adapted, None)
    assert abs(paint(exported) - paint(adapted)).max() > 5
    assert same_weights(adapted, tiny_pipeline())


def test_a_single_file_takes_every_adapter_as_a_patch(adapted, sd1_folder, tmp_path):
    export_all(adapted, tmp_path / "all", single_file=True)
    set_style(adapted, None)
    assert (paint(plain_file(tmp_path / "all/model.safetensors", sd1_folder)) == paint(adapted)).all()
    for style in NAMES:
        patch = load_file(tmp_path / f"all/styles/{style}.safetensors")
        save_file({**load_file(tmp_path / "all/model.safetensors"), **patch}, tmp_path / f"{style}.safetensors")
        set_style(adapted, style)
        assert abs(paint(plain_file(tmp_path / f"{style}.safetensors", sd1_folder)) - paint(adapted)).max() <= 2


@pytest.mark.parametrize("style", NAMES)
def test_a_lora_in_diffusers_lacks_the_differences_beside_it_and_nothing_else(adapted, tmp_path, style):
    export_all(adapted, tmp_path / "all")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "all", safety_checker=None)
    plain.load_lora_weights(tmp_path / "all/loras", weight_name=f"{style}.safetensors")
    plain.fuse_lora()
    plain.unload_lora_weights()
    set_style(adapted, style)
    assert abs(paint(plain) - paint(adapted)).max() > 2
    adapter = adapted.unet.time_embedding.linear_2.style_prompts.adapters[style]
    parameters = dict(plain.unet.named_parameters())
    with torch.no_grad():
        for name, offset in adapter.offsets.items():
            parameters[name] += offset
    assert abs(paint(plain) - paint(adapted)).max() <= 2
