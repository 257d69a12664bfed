"""An exported checkpoint paints, in plain diffusers, what the merged model paints in that style."""

import json

import numpy as np
import pytest
import torch
from conftest import PROVENANCE, STYLE_NAMES, tiny_pipeline
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from helpers import copy_folder, paint
from peft import LoraConfig
from PIL import Image
from plugin_helpers import save_lora, tiny_controlnet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm.errors import UserError
from dmm.models.style_names import read_style_names
from dmm.models.styles import StylePrompts, styled_port
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.export import export_all, export_authors, export_style, patch_files
from dmm.pipeline.styled import (
    add_styles,
    load_pipeline,
    read_styles,
    save_pipeline,
    set_style,
    stock_twin,
    style_names,
)

MIX = {"ink": 0.7, "photo": 0.3}
STYLES = [*STYLE_NAMES, MIX]


def plain_folder(folder, **options):
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **options)


def plain_file(file, config):
    return StableDiffusionPipeline.from_single_file(str(file), config=str(config), safety_checker=None)


def metadata_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_export_paints_as_the_style_that_it_was_made_of(styled, sd1_folder, tmp_path, style, kind):
    set_style(styled, style)
    prompted = paint(styled)
    if kind == "folder":
        export_style(styled, style, tmp_path / "out")
        exported = plain_folder(tmp_path / "out")
    else:
        export_style(styled, style, tmp_path / "out.safetensors")
        exported = plain_file(tmp_path / "out.safetensors", sd1_folder)
    assert type(exported.unet.time_embedding).__name__ == "TimestepEmbedding"
    assert abs(paint(exported) - prompted).max() <= 2
    set_style(styled, None)
    assert abs(paint(styled) - prompted).max() > 5


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_so_it_does_with_a_lora_and_a_controlnet_on(styled, sd1_folder, tmp_path, style):
    save_lora(tmp_path / "lora.safetensors")
    controlnet = tiny_controlnet()
    edges = Image.effect_noise((16, 16), 90).convert("RGB")
    export_style(styled, style, tmp_path / "out.safetensors")
    set_style(styled, style)
    painted = []
    for pipe in (styled, plain_file(tmp_path / "out.safetensors", sd1_folder)):
        guided = StableDiffusionControlNetPipeline(
            **pipe.components, controlnet=controlnet, requires_safety_checker=False
        )
        without = paint(guided, image=edges)
        guided.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="pencil")
        guided.set_adapters(["pencil"], [0.8])
        painted.append(paint(guided, image=edges))
        assert abs(painted[-1] - without).max() > 5
    assert abs(painted[0] - painted[1]).max() <= 2


def test_exporting_changes_nothing_of_the_merged_model(styled, tmp_path):
    set_style(styled, "clay")
    before, bias = paint(styled), styled.unet.time_embedding.linear_2.bias.clone()
    export_style(styled, "ink", tmp_path / "ink.safetensors")
    export_all(styled, tmp_path / "all")
    assert styled.unet.time_embedding.linear_2.bias.equal(bias)
    assert (paint(styled) == before).all()


def test_a_stock_twin_shares_all_weights_but_the_module_that_embeds_time(styled):
    twin = stock_twin(styled, "ink")
    ours, theirs = dict(styled.unet.named_parameters()), dict(twin.unet.named_parameters())
    assert ours.keys() == theirs.keys()
    own = {name for name in ours if ours[name].data_ptr() != theirs[name].data_ptr()}
    assert own
    assert all(name.startswith("time_embedding.") for name in own)
    assert styled_port(twin.unet) is None


def test_the_header_says_where_it_came_from(merged, tmp_path):
    pipe = load_pipeline(merged)
    export_style(pipe, MIX, tmp_path / "mix.safetensors")
    export_style(pipe, "ink", tmp_path / "ink")
    told = metadata_of(tmp_path / "mix.safetensors")
    assert told["modelspec.architecture"] == "stable-diffusion-v1"
    assert told["modelspec.prediction_type"] == "epsilon"
    assert told["modelspec.resolution"] == "16x16"
    assert told["modelspec.title"] == "DMM merge: ink=0.7, photo=0.3"
    assert told["modelspec.merged_from"] == "ink.safetensors, photo.safetensors, clay.safetensors"
    assert json.loads(told["sd_merge_recipe"])["style"] == MIX
    assert json.loads(told["sd_merge_models"])["0" * 64]["name"] == "clay.safetensors"  # all three are of one digest
    assert not any("models/" in value for value in told.values())  # where they lay is nobody's business
    assert not any(
        str(merged.parent) in path.read_text(encoding="utf-8") for path in (tmp_path / "ink").rglob("*.json")
    )
    folder = metadata_of(tmp_path / "ink/unet/diffusion_pytorch_model.safetensors")
    assert json.loads(folder["sd_merge_recipe"])["style"] == {"ink": 1.0}


def test_sources_are_told_by_their_digests(styled, tmp_path):
    styled_port(styled.unet).style_prompts.provenance = [
        type(one)(one.name, one.source, str(i) * 64, one.family, one.prediction_type)
        for i, one in enumerate(PROVENANCE)
    ]
    export_style(styled, "ink", tmp_path / "ink.safetensors")
    models = json.loads(metadata_of(tmp_path / "ink.safetensors")["sd_merge_models"])
    assert {digest: one["style"] for digest, one in models.items()} == {
        "0" * 64: "ink",
        "1" * 64: "photo",
        "2" * 64: "clay",
    }


def test_where_the_sources_are_not_known_nothing_is_made_up(styled, tmp_path):
    export_style(styled, "ink", tmp_path / "ink.safetensors")
    assert "sd_merge_models" not in metadata_of(tmp_path / "ink.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_opens_in_plain_diffusers(styled, tmp_path, dtype):
    set_style(styled, "ink")
    prompted = paint(styled)
    export_style(styled, "ink", tmp_path / "half", dtype=dtype)
    export_style(styled, "ink", tmp_path / "half.safetensors", dtype=dtype)
    for component, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        stored = load_file(tmp_path / "half" / component / f"{stem}.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert {file.name for file in (tmp_path / "half/tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    plain = plain_folder(tmp_path / "half")
    assert plain.text_encoder.dtype == plain.unet.dtype == torch.float32
    assert abs(paint(plain) - prompted).mean() < 5
    assert plain_folder(tmp_path / "half", torch_dtype=dtype).text_encoder.dtype == dtype
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {dtype}


def test_a_merged_pipeline_saved_in_half_precision_opens_in_plain_diffusers_too(merged, tmp_path):
    save_pipeline(load_pipeline(merged, torch_dtype=torch.bfloat16), tmp_path / "half")
    plain = plain_folder(tmp_path / "half")
    assert plain.text_encoder.dtype == plain.unet.dtype == torch.float32
    paint(plain)


# all styles at once: the two lines that docs/export.md tells, for either kind


def test_all_styles_as_a_folder_and_patches(styled, tmp_path):
    export_all(styled, tmp_path / "all")
    pipe = plain_folder(tmp_path / "all")
    set_style(styled, None)
    assert (paint(pipe) == paint(styled)).all()
    for style in STYLE_NAMES:
        patch = load_file(tmp_path / f"all/styles/{style}.safetensors")
        pipe.unet.load_state_dict(patch, strict=False)

        set_style(styled, style)
        assert abs(paint(pipe) - paint(styled)).max() <= 2
        assert patch.keys() == {"time_embedding.linear_2.bias"}
        assert (tmp_path / f"all/styles/{style}.safetensors").stat().st_size < 10_000


def test_an_export_of_all_styles_is_a_stock_model_to_us_too(styled, tmp_path):
    export_all(styled, tmp_path / "all")
    assert read_style_names(str(tmp_path / "all")) == []
    assert read_styles(tmp_path / "all") is None
    assert (paint(open_pipeline(ModelSource(tmp_path / "all"))) == paint(stock_twin(styled))).all()
    (tmp_path / "all/styles/config.json").write_text("{}")  # a merged model's, damaged
    with pytest.raises(UserError, match=r"styles.config\.json describes a None"):
        read_styles(tmp_path / "all")


def test_all_styles_as_a_single_file_and_patches(styled, sd1_folder, tmp_path):
    export_all(styled, tmp_path / "all", single_file=True)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["loras", "model.safetensors", "styles"]
    for style in STYLE_NAMES:
        tensors = load_file(tmp_path / "all/model.safetensors")
        tensors |= load_file(tmp_path / f"all/styles/{style}.safetensors")
        save_file(tensors, tmp_path / f"{style}.safetensors")

        set_style(styled, style)
        assert abs(paint(plain_file(tmp_path / f"{style}.safetensors", sd1_folder)) - paint(styled)).max() <= 2
        one = load_file(tmp_path / f"{style}.safetensors")
        export_style(styled, style, tmp_path / "alone.safetensors", overwrite=True)
        alone = load_file(tmp_path / "alone.safetensors")
        assert one.keys() == alone.keys()
        assert all(one[name].equal(alone[name]) for name in one)


def test_names_that_no_file_system_takes_still_get_a_patch_each(pipeline, tmp_path):
    add_styles(pipeline, StylePrompts(["a/b", "a:b", "ç"], dim=32))
    assert patch_files(pipeline) == ["a-b.safetensors", "a-b-2.safetensors", "ç.safetensors"]
    export_all(pipeline, tmp_path / "all")
    assert len(list((tmp_path / "all/styles").iterdir())) == 3


# what is refused, in a sentence, leaving nothing


def test_a_stock_model_is_refused(pipeline, tmp_path):
    for export in (lambda: export_style(pipeline, "ink", tmp_path / "x"), lambda: export_all(pipeline, tmp_path / "x")):
        with pytest.raises(UserError, match="it is a stock model"):
            export()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("style", "message"), [("inc", "no style 'inc'"), ({"ink": 0.5}, "sum to 0.5")])
def test_wrong_styles_are_refused(styled, tmp_path, style, message):
    with pytest.raises(UserError, match=message):
        export_style(styled, style, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_exists_is_kept(styled, tmp_path):
    (tmp_path / "x.safetensors").write_text("mine")
    with pytest.raises(UserError, match=r"x\.safetensors' exists"):
        export_style(styled, "ink", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not empty"):
        export_style(styled, "ink", tmp_path)
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    export_style(styled, "ink", tmp_path / "x.safetensors", overwrite=True)
    assert load_file(tmp_path / "x.safetensors")


def test_an_adapter_on_it_is_not_exported_quietly(styled, tmp_path):
    styled.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for output in ("x.safetensors", "x"):
        with pytest.raises(UserError, match="unet has an adapter on it"):
            export_style(styled, "ink", tmp_path / output)
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_half_precision_are_refused(styled, tmp_path):
    styled.vae.decoder.conv_in.bias.data[0] = 1e6
    with pytest.raises(UserError, match=r"the vae: 1 of the .* 'decoder\.conv_in\.bias' are NaN or infinite"):
        export_style(styled, "ink", tmp_path / "x.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_style_too_large_for_float32_is_refused_in_every_form(styled, tmp_path):
    styled_port(styled.unet).style_prompts.linear_2.weight.data *= 1e38
    for export in (
        lambda: export_style(styled, "ink", tmp_path / "x.safetensors"),
        lambda: export_style(styled, "ink", tmp_path / "x"),
        lambda: export_all(styled, tmp_path / "x"),
        lambda: export_authors(styled, tmp_path / "x", dtype=torch.float16),
        lambda: export_authors(styled, tmp_path / "x.safetensors", dtype=torch.float16),
    ):
        with pytest.raises(UserError, match=r"linear_2\.(bias|weight)' are NaN or infinite in torch"):
            export()
    assert not list(tmp_path.iterdir())


def test_the_tools_that_read_text_encoders_find_their_names(styled, tmp_path):
    export_style(styled, "ink", tmp_path / "x")
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "x/text_encoder/model.safetensors"))


def test_a_v_prediction_model_says_so(tmp_path, sd1_folder):
    pipe = tiny_pipeline(prediction_type="v_prediction")
    add_styles(pipe, StylePrompts(["ink"], dim=32))
    export_style(pipe, "ink", tmp_path / "v.safetensors")
    assert metadata_of(tmp_path / "v.safetensors")["modelspec.prediction_type"] == "v"
    assert load_file(tmp_path / "v.safetensors")["v_pred"].numel() == 0  # what A1111, Forge and ComfyUI look for


def test_a_controlnet_started_from_an_export_takes_its_style(styled, tmp_path):
    # from_unet copies the module that embeds time, bias and all
    export_style(styled, "ink", tmp_path / "x")
    unet = plain_folder(tmp_path / "x").unet
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    assert net.time_embedding.linear_2.bias.equal(unet.time_embedding.linear_2.bias)
    assert copy_folder(tmp_path / "x", tmp_path / "y").is_dir()
    assert np.isfinite(paint(plain_folder(tmp_path / "y"))).all()


def test_adapters_alone_are_loras_however_narrow_the_model(adapted, tmp_path):
    made = export_all(adapted, tmp_path / "all")
    assert (made.are_loras, made.error) == (True, 0)
    assert not (tmp_path / "all" / "loras" / "diffusers").exists()
    assert {f"{name}.safetensors" for name in style_names(adapted)} <= {
        path.name for path in (tmp_path / "all" / "loras").iterdir()
    }


def test_the_authors_layout_has_no_place_for_adapters(adapted, tmp_path):
    with pytest.raises(UserError, match="are adapters, for which the layout of DMM's authors has no place"):
        export_authors(adapted, tmp_path / "authors")
    assert not (tmp_path / "authors").exists()
