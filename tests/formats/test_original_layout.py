"""The original layout of every family: names, forms, and there and back again."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import rewrite, same_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import TINY, UNETS
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dmm.errors import UserError
from dmm.families import FAMILIES
from dmm.formats.original_layout import from_original, original_places, to_original
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, check_model, open_pipeline


@pytest.fixture(scope="module", params=UNETS)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def on_disk(family, tmp_path_factory):
    """A model, its folder and its single file; read only."""
    at = tmp_path_factory.mktemp(family.name)
    pipe = TINY[family.name]()
    pipe.save_pretrained(at / "folder")
    save_single_file(pipe, at / "model.safetensors")
    return pipe, at / "folder", at / "model.safetensors"


def test_diffusers_reads_the_file_as_the_folder(family, on_disk):
    pipe, folder, file = on_disk
    opened = family.pipeline_class.from_single_file(str(file), config=str(folder), local_files_only=True)
    assert same_weights(opened, pipe)


def test_we_do_too_with_the_configs_that_the_file_carries(on_disk):
    pipe, _, file = on_disk
    opened = open_pipeline(ModelSource(file))
    assert same_weights(opened, pipe)
    assert opened.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type


def test_there_and_back_again_is_the_same(family, on_disk):
    pipe, *_ = on_disk
    for component, places in original_places(pipe.components, family).items():
        tensors = getattr(pipe, component).state_dict()
        assert places.keys() == tensors.keys()
        again = from_original(to_original(tensors, places), places)
        assert all(again[name].equal(tensor) for name, tensor in tensors.items())


def test_text_encoders_of_one_width_are_told_apart_too(tmp_path):
    # diffusers goes by their widths: it would read the first in place of the second
    pipe = TINY["sdxl"]()
    torch.manual_seed(1)
    config = pipe.text_encoder_2.config
    config.hidden_size = pipe.text_encoder.config.hidden_size
    pipe.register_modules(
        text_encoder_2=CLIPTextModelWithProjection(config),
        unet=UNet2DConditionModel.from_config({**pipe.unet.config, "cross_attention_dim": 2 * config.hidden_size}),
    )
    save_single_file(pipe, tmp_path / "model.safetensors")
    assert same_weights(open_pipeline(ModelSource(tmp_path / "model.safetensors")), pipe)


def kept_of_sd2(tensors):
    """What the files that Stability AI published hold, and folders do not: the last layer, and a projection."""
    prefix = "cond_stage_model.model."
    last = {name: t for name, t in tensors.items() if f"{prefix}transformer.resblocks.1." in name}
    return {
        **tensors,
        **{name.replace("resblocks.1.", "resblocks.23."): torch.ones_like(tensor) for name, tensor in last.items()},
        f"{prefix}text_projection": torch.ones(16, 16),
        f"{prefix}logit_scale": torch.ones(()),
    }


def kept_of_sdxl(tensors):
    return {**tensors, "conditioner.embedders.1.model.logit_scale": torch.ones(())}


@pytest.mark.parametrize(("name", "kept"), [("sd2", kept_of_sd2), ("sdxl", kept_of_sdxl)])
def test_what_published_files_hold_beside_does_no_harm(tmp_path, name, kept):
    pipe = TINY[name]()
    save_single_file(pipe, tmp_path / "plain.safetensors")
    with safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(kept(load_file(tmp_path / "plain.safetensors")), tmp_path / "model.safetensors", metadata)
    assert same_weights(open_pipeline(ModelSource(tmp_path / "model.safetensors")), pipe)


PROJECTION = "conditioner.embedders.1.model.text_projection"
IN_A_ROW = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(PROJECTION), f"lacks 1 of the .* tensors .* the first of them '{PROJECTION}'"),
        (
            lambda tensors: tensors.update({PROJECTION: torch.ones(24)}),
            r"has shape \(24,\), the config's .* \(12, 24\)",
        ),
        (lambda tensors: tensors.pop(IN_A_ROW), f"lacks 3 of the .* tensors .* the first of them '{IN_A_ROW}'"),
        (lambda tensors: tensors.update({IN_A_ROW: torch.ones(73, 24)}), r"has shape \(73, 24\), .* \(24, 24\)"),
        (lambda tensors: tensors.update({IN_A_ROW: torch.ones(())}), r"has shape \(\), .* \(24, 24\)"),
        (
            lambda tensors: tensors.update({"conditioner.embedders.1.model.extra": torch.ones(1)}),
            "has no use for: 1, the first of them 'conditioner.embedders.1.model.extra'",
        ),
        (
            lambda tensors: tensors.update({"conditioner.embedders.0.model.ln_final.weight": torch.ones(1)}),
            "is the SDXL refiner",
        ),
    ],
    ids=["no projection", "a flat projection", "no attention", "a row too many", "a scalar", "one more", "refiner"],
)
def test_damage_is_one_sentence(tmp_path, change, told):
    save_single_file(TINY["sdxl"](), tmp_path / "plain.safetensors")
    rewrite(tmp_path / "plain.safetensors", tmp_path / "model.safetensors", change)
    with pytest.raises(UserError, match=told):
        check_model(ModelSource(tmp_path / "model.safetensors"))


def real_text(kind, width, layers):
    return kind(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers))


REAL = {
    "sd2": {
        "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        "text_encoder": (CLIPTextModel, 1024, 23),
        "known": {
            "text_encoder": {
                "embeddings.position_embedding.weight": "positional_embedding",
                "encoder.layers.22.self_attn.v_proj.bias": "transformer.resblocks.22.attn.in_proj_bias",
            },
        },
    },
    "sdxl": {
        "unet": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "text_encoder": (CLIPTextModel, 768, 12),
        "text_encoder_2": (CLIPTextModelWithProjection, 1280, 32),
        "known": {
            "unet": {
                "add_embedding.linear_2.bias": "label_emb.0.2.bias",
                "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2.weight": (
                    "input_blocks.8.1.transformer_blocks.9.ff.net.2.weight"
                ),
                "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
                "up_blocks.2.resnets.2.conv_shortcut.bias": "output_blocks.8.0.skip_connection.bias",
            },
            "text_encoder": {"final_layer_norm.bias": "text_model.final_layer_norm.bias"},
            "text_encoder_2": {
                "text_projection.weight": "text_projection",
                "text_model.encoder.layers.31.mlp.fc2.bias": "transformer.resblocks.31.mlp.c_proj.bias",
                "text_model.encoder.layers.0.self_attn.q_proj.weight": "transformer.resblocks.0.attn.in_proj_weight",
            },
        },
    },
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_one_maps_wholly(name):
    with torch.device("meta"):
        models = {"unet": UNet2DConditionModel(**REAL[name]["unet"])}
        models |= {
            part: real_text(*REAL[name][part]) for part in ("text_encoder", "text_encoder_2") if part in REAL[name]
        }
    places = original_places(models, FAMILIES[name])
    for component, model in models.items():
        found = places[component]
        assert found.keys() == model.state_dict().keys()
        assert len({(place.name, place.part) for place in found.values()}) == len(found)
    prefixes = {component.name: component.original_prefix for component in FAMILIES[name].components}
    for component, known in REAL[name]["known"].items():
        for ours, theirs in known.items():
            assert places[component][ours].name == prefixes[component] + theirs
