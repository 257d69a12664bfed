"""What holds of styled pipelines holds in every family; SD 1.x has files of its own."""

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from helpers import same_weights
from PIL import Image
from plugin_helpers import randomize, save_ip_adapter
from tiny_families import TINY

import dmm
from dmm.errors import UserError
from dmm.families import FAMILIES, Frame, ask, denoiser_of, family_of
from dmm.models.conditioning import encode_tokens, tokenize
from dmm.models.styles import StylePrompts
from dmm.pipeline.plugins import Control, IPAdapter, Start, add_plugins
from dmm.pipeline.regions import Region, paint_regions
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import add_styles, share, stock_twin

MIX = {"ink": 0.7, "photo": 0.3}
SIZE = {"width": 16, "height": 16}


@pytest.fixture(params=[name for name in FAMILIES if name != "sd1"])
def styled(request):
    pipe = TINY[request.param](seed=0)
    torch.manual_seed(1)
    prompts = StylePrompts(list(MIX), dim=32)
    torch.nn.init.normal_(prompts.linear_2.weight, std=2)
    add_styles(pipe, prompts)
    return pipe


def paint(pipe, inputs=None, **settings):
    (picture,) = sample(pipe, ["a cat"], [0], inputs=inputs, steps=3, **settings)
    return np.asarray(picture, dtype=int)


def predict(pipe):
    denoiser, family = denoiser_of(pipe), family_of(pipe)
    read = encode_tokens(pipe, tokenize(pipe, ["a cat"]))
    size = {name: one[None] for name, one in family.read_size(Frame.whole(16, 16)).items()}
    packing = family.packing
    channels = packing.channels(denoiser.config) if packing else denoiser.config.in_channels
    x_t = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ask(denoiser, x_t, torch.tensor([500]), read | size)


def test_without_a_style_it_is_the_stock_model_bit_for_bit(styled):
    assert predict(styled).equal(predict(TINY[family_of(styled).name](seed=0)))


def test_baked_is_prompted(styled):
    plain = predict(styled)
    dmm.set_style(styled, MIX)
    prompted = predict(styled)
    assert not prompted.allclose(plain, atol=1e-2)
    torch.testing.assert_close(predict(stock_twin(styled, MIX)), prompted, rtol=0, atol=1e-5)


def test_saved_and_loaded_it_paints_the_same(styled, tmp_path):
    dmm.save_pipeline(styled, tmp_path / "saved")
    again = dmm.load_pipeline(tmp_path / "saved")
    assert same_weights(again, styled)
    for pipe in (styled, again):
        dmm.set_style(pipe, MIX)
    torch.testing.assert_close(predict(again), predict(styled), rtol=0, atol=1e-5)


def test_a_shared_pipeline_has_its_own_style(styled):
    dmm.set_style(styled, "ink")
    second = share(styled)
    dmm.set_style(second, "photo")
    assert not predict(second).equal(predict(styled))
    dmm.set_style(second, "ink")
    assert predict(second).equal(predict(styled))


@pytest.mark.parametrize("styled", [n for n, one in FAMILIES.items() if one.reads_layers and n != "sd1"], indirect=True)
def test_a_skipped_layer_shows_and_an_empty_negative_prompt_is_what_it_is_without_skipping(styled):
    whole = paint(styled, **SIZE)
    skipped = paint(styled, clip_skip=1, **SIZE)
    assert not np.array_equal(whole, skipped)


def test_wide_and_tall_pictures_are_painted_in_their_sizes(styled):
    assert paint(styled, width=24, height=16).shape == (16, 24, 3)
    assert paint(styled, width=16, height=24).shape == (24, 16, 3)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture
def files(styled, tmp_path):
    """An image, a mask, and for a UNet's family a ControlNet and an IP-Adapter."""
    picture().save(tmp_path / "image.png")
    half = Image.new("L", (16, 16), 0)
    half.paste(255, (8, 0, 16, 16))
    half.save(tmp_path / "mask.png")
    if family_of(styled).controlnet is None:
        return tmp_path
    stock = TINY[family_of(styled).name](seed=0).unet
    torch.manual_seed(5)
    net = ControlNetModel.from_unet(stock, conditioning_embedding_out_channels=(4, 8))
    randomize(net, 5, std=0.1).save_pretrained(tmp_path / "controlnet")
    save_ip_adapter(tmp_path / "ip", cross_attention_dim=stock.config.cross_attention_dim, unet=stock)
    return tmp_path


@pytest.mark.parametrize("guide", ["control", "image", "mask", "control-mask", "adapter"])
def test_plugins_do_on_a_styled_model_what_they_do_on_a_baked_one(styled, files, guide):
    given = {}
    if "control" in guide:
        given["controls"] = [Control(files / "controlnet", files / "image.png")]
    if guide == "image":
        given["start"] = Start(files / "image.png", strength=0.8)
    if "mask" in guide:
        given["start"] = Start(files / "image.png", strength=0.8, mask=files / "mask.png")
    if guide == "adapter":
        given["ip_adapter"] = IPAdapter(files / "ip" / "ip-adapter.safetensors", files / "image.png", 0.6)
    dmm.set_style(styled, MIX)
    guides = {"image": {"image"}, "mask": {"image", "mask"}}.get(guide, {guide})
    if family_of(styled).controlnet is None and frozenset(guides) not in family_of(styled).pipelines:
        with pytest.raises(UserError, match=r"is not guided by|A mask is for models"):
            add_plugins(styled, **given)
        return
    pictures = []
    more = SIZE | ({"sampler": "Euler"} if family_of(styled).is_flow else {})
    for pipe in (stock_twin(styled, MIX), styled):
        guided, inputs = add_plugins(pipe, **given)
        pictures.append(paint(guided, lambda count, inputs=inputs: inputs(count, (16, 16)), **more))
        if guide == "adapter":
            guided.unload_ip_adapter()
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
    assert np.abs(pictures[0] - paint(styled, **more)).max() > 2


def test_regions_have_styles_and_prompts_of_their_own(styled):
    if not family_of(styled).takes_regions:
        with pytest.raises(UserError, match=r"Regions are cut out of latents, and .* passes its own as tokens"):
            paint_regions(styled, [Region((0, 0, 16, 16), "ink")], "a cat", width=16, height=16, steps=3)
        return
    whole = Region((0, 0, 16, 16), "ink")
    settings = {"width": 16, "height": 16, "steps": 3}
    plain = np.asarray(paint_regions(styled, [whole], "a cat", **settings), dtype=int)
    dmm.set_style(styled, "ink")
    assert np.abs(plain - paint(styled, **SIZE)).max() <= 1
    other = [Region((0, 0, 8, 16), "ink", "a dog"), Region((8, 0, 16, 16), "photo")]
    assert not np.array_equal(np.asarray(paint_regions(styled, other, "a cat", **settings)), plain)
