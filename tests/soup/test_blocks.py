import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import UNet2DConditionModel
from tiny_families import TINY

from dmm.errors import UserError
from dmm.families import FAMILIES
from dmm.families.sd1 import SD1
from dmm.formats.original_layout import original_names
from dmm.soup.blocks import Blocks

SD1_UNET = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}


@pytest.fixture(scope="module")
def names():
    """Diffusers' name -> the original one, of a UNet with SD 1.x's blocks."""
    pipe = tiny_pipeline()
    unet: UNet2DConditionModel = tiny_unet(**SD1_UNET)
    return original_names({"unet": unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}, SD1)["unet"]


def test_both_layouts_of_three_levels_have_the_same_blocks():
    unet = TINY["sdxl"]().unet
    widths = {"block_out_channels": (8, 16, 16), "transformer_layers_per_block": (1, 2, 2), "layers_per_block": 2}
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**unet.config, **widths, **kinds})
    names = original_names({"unet": unet}, FAMILIES["sdxl"])["unet"]
    ours, theirs = Blocks.of(f"unet/{name}" for name in names), Blocks.of(names.values())
    assert ours.names == theirs.names
    assert (ours.names[0], ours.names[9], ours.names[-1], len(ours.names)) == ("BASE", "IN08", "OUT08", 20)
    for one, other in names.items():
        assert ours.block_of(f"unet/{one}") == theirs.block_of(other), other
    assert ours.block_of("unet/add_embedding.linear_1.bias") == "IN00"


def test_both_layouts_have_the_same_blocks(names):
    ours, theirs = Blocks.of(f"unet/{name}" for name in names), Blocks.of(names.values())
    assert ours.names == theirs.names
    assert len(ours.names) == 26
    for one, other in names.items():
        assert ours.block_of(f"unet/{one}") == theirs.block_of(other), other


def test_known_places():
    blocks = Blocks.of([f"model.diffusion_model.{side}_blocks.11.0.x" for side in ("input", "output")])
    for tensor, block in {
        "model.diffusion_model.input_blocks.4.1.norm.weight": "IN04",
        "model.diffusion_model.middle_block.1.norm.weight": "M00",
        "model.diffusion_model.output_blocks.11.0.x": "OUT11",
        "model.diffusion_model.out.2.weight": "OUT11",
        "model.diffusion_model.time_embed.0.weight": "IN00",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": "BASE",
        "first_stage_model.quant_conv.bias": "BASE",
    }.items():
        assert blocks.block_of(tensor) == block


def test_sdxl_has_twenty():
    sdxl = [f"model.diffusion_model.{side}_blocks.8.0.x" for side in ("input", "output")]
    assert len(Blocks.of(sdxl).names) == 20


def test_rules_choose_blocks_ranges_and_expressions(names):
    tensors = [*names.values(), "cond_stage_model.x"]
    blocks = Blocks.of(tensors)
    for pattern, expected in {"IN03": ["IN03"], "IN10-OUT00": ["IN10", "IN11", "M00", "OUT00"]}.items():
        assert {blocks.block_of(name) for name in blocks.select(pattern, tensors)} == set(expected)
    assert all("attn2" in name for name in blocks.select("/attn2/", tensors))
    assert blocks.select("BASE", tensors) == ["cond_stage_model.x"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("IN12", "no block 'IN12'.*IN00 to OUT11"), ("/(/", "no regular expression"), ("/nothing/", "for none of")],
)
def test_rules_for_nothing_are_refused(names, pattern, message):
    with pytest.raises(UserError, match=message):
        Blocks.of(names.values()).select(pattern, list(names.values()))
