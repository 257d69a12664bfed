"""Exports of every family paint, in plain diffusers, what the merged model paints."""

import pytest
import torch
from helpers import paint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import TINY, UNETS

from dmm.families import FAMILIES
from dmm.models.styles import StylePrompts
from dmm.pipeline.export import export_all, export_style
from dmm.pipeline.styled import add_styles, set_style

WIDTH = 256  # of the layer that embeds time, as wide beside its input as a real one
LAYER = "lora_unet_time_embedding_linear_2"


@pytest.fixture(params=[name for name in UNETS if name != "sd1"])
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def styled(family):
    pipe = TINY[family.name]()
    torch.manual_seed(3)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    pipe.register_modules(unet=type(pipe.unet)(**{**config, "time_embedding_dim": WIDTH}))
    prompts = StylePrompts(["ink", "photo"], dim=WIDTH)
    torch.nn.init.normal_(prompts.linear_2.weight, std=0.5)
    add_styles(pipe, prompts)
    return pipe


def plain_folder(family, folder):
    return family.pipeline_class.from_pretrained(folder)


def plain_file(family, file, config):
    return family.pipeline_class.from_single_file(str(file), config=str(config), local_files_only=True)


def test_a_style_as_a_folder_and_as_a_file(family, styled, tmp_path):
    export_style(styled, "ink", tmp_path / "ink")
    export_style(styled, "ink", tmp_path / "ink.safetensors", dtype=torch.float16)
    export_style(styled, "ink", tmp_path / "full.safetensors")
    set_style(styled, "ink")
    prompted = paint(styled)
    folder = plain_folder(family, tmp_path / "ink")
    assert abs(paint(folder) - prompted).max() <= 2
    assert abs(paint(plain_file(family, tmp_path / "full.safetensors", tmp_path / "ink")) - prompted).max() <= 2
    set_style(styled, None)
    assert abs(paint(styled) - prompted).max() > 5
    with safe_open(tmp_path / "ink.safetensors", framework="pt") as file:
        told = file.metadata()
    known = {"sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}  # as tools write it
    assert told["modelspec.architecture"] == known[family.name]
    assert (
        told["modelspec.prediction_type"]
        == {"epsilon": "epsilon", "v_prediction": "v"}[styled.scheduler.config.prediction_type]
    )
    kept = load_file(tmp_path / "ink.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    assert ("v_pred" in kept) == (styled.scheduler.config.prediction_type == "v_prediction")
    for component in family.components:
        assert any(name.startswith(component.original_prefix) for name in kept)


def test_all_styles_as_patches_and_as_loras(family, styled, tmp_path):
    made = export_all(styled, tmp_path / "all")
    export_all(styled, tmp_path / "file", single_file=True)
    assert made.are_loras
    for style in ("ink", "photo"):
        set_style(styled, style)
        prompted = paint(styled)
        pipe = plain_folder(family, tmp_path / "all")
        plain = paint(pipe)
        assert abs(prompted - plain).max() > 5
        lora = tmp_path / f"all/loras/{style}.safetensors"
        # by the name that it is written under, and by that of the original layout
        other = tmp_path / "other.safetensors"
        save_file({name.replace(LAYER, "lora_unet_time_embed_2"): one for name, one in load_file(lora).items()}, other)
        for file in (lora, other, tmp_path / f"all/loras/diffusers/{style}.safetensors"):
            pipe.load_lora_weights(file)
            assert abs(paint(pipe) - prompted).max() <= 2, file
            pipe.unload_lora_weights()
        pipe.unet.load_state_dict(load_file(tmp_path / f"all/styles/{style}.safetensors"), strict=False)
        assert abs(paint(pipe) - prompted).max() <= 2
        tensors = load_file(tmp_path / "file/model.safetensors")
        tensors |= load_file(tmp_path / f"file/styles/{style}.safetensors")
        save_file(tensors, tmp_path / "patched.safetensors")
        assert abs(paint(plain_file(family, tmp_path / "patched.safetensors", tmp_path / "all")) - prompted).max() <= 2
        with safe_open(lora, framework="pt") as file:
            assert file.metadata()["ss_base_model_version"] == family.kohya_name


def test_a_zero_snr_v_model_carries_both_marks(tmp_path):
    schedule = {"rescale_betas_zero_snr": True}
    pipe = TINY["sdxl"](prediction_type="v_prediction", **schedule)
    add_styles(pipe, StylePrompts(["ink"], dim=32))
    export_style(pipe, "ink", tmp_path / "v.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "v.safetensors").keys()
