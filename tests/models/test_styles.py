"""Styles reach a stock UNet without changing what it is."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.models.styles import StylePrompts, attach_styles, bake, detach_styles, style_weights, styled_port

NAMES = ("ink", "photo", "clay")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


@pytest.fixture
def prompts():
    torch.manual_seed(1)
    return StylePrompts(NAMES, dim=32).eval()


def call(unet, batch=2):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    text = torch.randn(batch, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor(500), text).sample


def set_term(unet, prompts, style):
    with torch.no_grad():
        styled_port(unet).term = None if style is None else prompts(style_weights(NAMES, style))


def test_with_no_style_set_a_styled_unet_equals_the_plain_one_bit_for_bit(unet, prompts):
    plain = call(unet)
    attach_styles(unet, prompts, SD1.port)
    assert torch.equal(call(unet), plain)
    set_term(unet, prompts, "ink")
    assert not torch.equal(call(unet), plain)
    set_term(unet, prompts, None)
    assert torch.equal(call(unet), plain)
    detach_styles(unet)
    assert torch.equal(call(unet), plain)


def test_a_styled_unet_saves_as_the_plain_one(unet, prompts, tmp_path):
    unet.save_pretrained(tmp_path / "plain")
    attach_styles(unet, prompts, SD1.port)
    unet.save_pretrained(tmp_path / "styled")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "styled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    again = UNet2DConditionModel.from_pretrained(tmp_path / "styled")
    assert torch.equal(call(again.eval()), call(unet))


@pytest.mark.parametrize("style", ["photo", {"ink": 0.7, "clay": 0.3}])
def test_a_baked_style_equals_the_prompted_one(unet, prompts, style):
    baked = copy.deepcopy(unet)
    attach_styles(unet, prompts, SD1.port)
    set_term(unet, prompts, style)
    bake(baked, styled_port(unet).term, SD1.port)
    assert styled_port(baked) is None
    torch.testing.assert_close(call(baked), call(unet), rtol=0, atol=2e-6)


def test_baking_takes_attached_styles_off(unet, prompts):
    attach_styles(unet, prompts, SD1.port)
    set_term(unet, prompts, "ink")
    prompted = call(unet)
    bake(unet, styled_port(unet).term, SD1.port)
    assert styled_port(unet) is None
    torch.testing.assert_close(call(unet), prompted, rtol=0, atol=2e-6)


def test_the_mix_is_taken_before_the_mlp(prompts):
    midpoint = prompts(style_weights(NAMES, {"ink": 0.5, "photo": 0.5}))
    mean = (prompts.embeddings[0] + prompts.embeddings[1]) / 2
    torch.testing.assert_close(midpoint, prompts.linear_2(prompts.act(prompts.linear_1(mean))))


def test_one_style_an_image_equals_each_style_alone(unet, prompts):
    attach_styles(unet, prompts, SD1.port)
    alone = []
    for i, style in enumerate(("ink", "clay")):
        set_term(unet, prompts, style)
        alone.append(call(unet)[i])
    set_term(unet, prompts, ["ink", "clay"])
    torch.testing.assert_close(call(unet), torch.stack(alone), rtol=0, atol=2e-6)


def test_guidance_makes_blocks_of_the_list_and_other_batches_are_refused(unet, prompts):
    attach_styles(unet, prompts, SD1.port)
    set_term(unet, prompts, ["ink", "clay"])
    assert torch.isfinite(call(unet, batch=4)).all()
    with pytest.raises(ValueError, match="2 styles were set, one for each image, and the images of a batch are 3: set"):
        call(unet, batch=3)
    with pytest.raises(ValueError, match="are 4 under guidance, 8 without: set"):
        call(unet, batch=8)


def test_a_copy_has_a_style_of_its_own(unet, prompts):
    attach_styles(unet, prompts, SD1.port)
    set_term(unet, prompts, "ink")
    prompted, twin = call(unet), copy.deepcopy(unet)
    set_term(unet, prompts, None)
    assert torch.equal(call(twin), prompted)
    assert styled_port(twin).style_prompts.names == list(NAMES)


def test_the_term_follows_the_model_to_another_dtype(unet, prompts):
    attach_styles(unet, prompts, SD1.port)
    set_term(unet, prompts, "ink")
    unet.to(torch.bfloat16)
    assert styled_port(unet).term.dtype == torch.bfloat16
    assert styled_port(unet).style_prompts.embeddings.dtype == torch.bfloat16


def test_the_codebook_gets_its_gradient_through_the_unet(unet, prompts):
    attach_styles(unet, prompts, SD1.port)
    styled_port(unet).term = prompts(style_weights(NAMES, ["ink", "photo"]))
    unet(torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 5, 16)).sample.square().mean().backward()
    norms = prompts.embeddings.grad.norm(dim=1)
    assert (norms[:2] > 0).all()
    assert norms[2] == 0


def test_style_prompts_save_and_load_with_their_names(prompts, tmp_path):
    prompts.save_pretrained(tmp_path)
    again = StylePrompts.from_pretrained(tmp_path)
    assert again.names == list(NAMES)
    assert torch.equal(again.embeddings, prompts.embeddings)


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("fhoto", "no style 'fhoto'; did you mean 'photo'"),
        ({"ink": 0.6, "photo": 0.6}, "sum to 1.2. In the same proportions: ink=0.5,photo=0.5.$"),
        ({"ink": 1, "photo": 1, "clay": 1}, "sum to 3. In the same proportions: ink=0.333333,photo=0.333333,clay=0.33"),
        ({"ink": float("nan")}, "sum to nan.$"),
        ({"ink": 1, "photo": -1}, "sum to 0.$"),
        ({}, "sum to 0.$"),
        ({"ink": "much"}, "The weight of 'ink' in a mix is a number, not 'much'"),
        ({3: 1.0}, "no style '3'"),
        (3, "A style is a name, or a mix such as .*; 3 is neither"),
        ([3], "; 3 is neither"),
        ([], "empty"),
    ],
)
def test_wrong_styles_are_told(style, message):
    with pytest.raises(UserError, match=message):
        style_weights(NAMES, style)


def test_style_prompts_of_another_width_are_refused(unet):
    with pytest.raises(UserError, match="16 wide"):
        attach_styles(unet, StylePrompts(NAMES, dim=16), SD1.port)
