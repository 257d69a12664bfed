"""Regions with styles of their own, and canvases larger than the model's."""

import numpy as np
import pytest
import torch
from PIL import Image
from plugin_helpers import tiny_controlnet

import dmm
from dmm.errors import UserError
from dmm.pipeline.plugins import Control, add_plugins
from dmm.pipeline.regions import Region, paint_regions
from dmm.pipeline.sampling import sample

SETTINGS = {"steps": 3, "guidance_scale": 3.0}
WHOLE = (0, 0, 16, 16)


def pixels(image):
    return np.asarray(image, dtype=int)


def plain(pipe, style, prompt="a cat", **settings):
    (picture,) = sample(pipe, [prompt], [0], styles=[style], **{**SETTINGS, **settings})
    return pixels(picture)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_region_of_the_whole_picture_is_the_plain_picture(styled, guidance):
    painted = paint_regions(styled, [Region(WHOLE, "ink")], "a cat", steps=3, guidance_scale=guidance)
    assert abs(pixels(painted) - plain(styled, "ink", guidance_scale=guidance)).max() <= 2


def test_two_regions_of_one_style_and_prompt_are_one(styled):
    halves = [Region((0, 0, 10, 16), "ink"), Region((6, 0, 16, 16), "ink", "a cat")]
    painted = paint_regions(styled, halves, "a cat", **SETTINGS)
    assert abs(pixels(painted) - plain(styled, "ink")).max() <= 2


def test_without_regions_it_is_the_style_of_everything(styled):
    assert (
        abs(pixels(paint_regions(styled, [], "a cat", style="photo", **SETTINGS)) - plain(styled, "photo")).max() <= 2
    )
    assert abs(pixels(paint_regions(styled, [], "a cat", **SETTINGS)) - plain(styled, None)).max() <= 2


def test_regions_without_guidance_are_painted_after_a_picture_with_it(styled):
    regions = [Region((0, 0, 8, 16), "ink"), Region((8, 0, 16, 16), "photo")]
    settings = {"steps": 2, "guidance_scale": 1.0}
    before = paint_regions(styled, regions, "a cat", **settings)
    styled("a cat", guidance_scale=3.0, num_inference_steps=1, output_type="latent")
    assert np.array_equal(pixels(paint_regions(styled, regions, "a cat", **settings)), pixels(before))


def test_each_region_counts_where_it_is(styled):
    """Latents mix the predictions, so with hard borders and one step each half is its own style's, bit for bit."""
    settings = {"steps": 1, "guidance_scale": 1.0, "sampler": "DDIM", "feather": 0}
    halves = [Region((0, 0, 8, 16), "ink"), Region((8, 0, 16, 16), "photo")]
    latents = {}
    for name, regions in (("ink", halves[:1]), ("photo", halves[1:]), ("both", halves)):
        whole = [Region(WHOLE, regions[0].style)] if len(regions) == 1 else regions
        latents[name] = decoded_latents(styled, whole, settings)
    middle = latents["both"].shape[-1] // 2
    assert torch.allclose(latents["both"][..., :middle], latents["ink"][..., :middle], atol=1e-6)
    assert torch.allclose(latents["both"][..., middle:], latents["photo"][..., middle:], atol=1e-6)
    assert not torch.allclose(latents["ink"], latents["photo"], atol=1e-3)


def decoded_latents(pipe, regions, settings):
    """What is given to the VAE to decode."""
    seen = []
    decode = type(pipe.vae).decode
    pipe.vae.decode = lambda latents, *a, **k: seen.append(latents) or decode(pipe.vae, latents, *a, **k)
    try:
        paint_regions(pipe, regions, "a cat", **settings)
    finally:
        del pipe.vae.decode
    return seen[0]


def test_a_regions_prompt_is_its_own(styled):
    own = paint_regions(styled, [Region(WHOLE, "ink", "a blue dog")], "a cat", **SETTINGS)
    assert abs(pixels(own) - plain(styled, "ink", "a blue dog")).max() <= 2


def test_a_mask_is_a_region(styled):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    one = paint_regions(styled, [Region(mask, "ink")], "a cat", style="photo", **SETTINGS)
    other = paint_regions(styled, [Region((0, 0, 8, 16), "ink")], "a cat", style="photo", **SETTINGS)
    assert (pixels(one) == pixels(other)).all()


@pytest.mark.parametrize("window", ["mixture", "multidiffusion"])
def test_tiles_of_a_canvas_of_one_tile_change_nothing(styled, window):
    painted = paint_regions(styled, [Region(WHOLE, "ink")], "a cat", tile=16, window=window, **SETTINGS)
    assert abs(pixels(painted) - plain(styled, "ink")).max() <= 2


def test_a_panorama_is_painted_in_tiles_of_the_models_own_size(styled):
    seen = []
    handle = styled.unet.register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape)))
    regions = [Region((0, 0, 24, 16), "ink"), Region((24, 0, 48, 16), "photo")]
    picture = paint_regions(styled, regions, "a cat", width=48, height=16, batch_size=2, **SETTINGS)
    handle.remove()
    assert picture.size == (48, 16)
    assert {shape[2:] for shape in seen} == {(8, 8)}
    assert max(shape[0] for shape in seen) == 4  # two rows at a time, in two parts of guidance
    assert styled.vae.use_tiling is False


def test_the_pipeline_is_left_as_it_was(styled):
    dmm.set_style(styled, "clay")
    before = plain(styled, "clay")
    paint_regions(styled, [Region((0, 0, 8, 16), "ink")], "a cat", **SETTINGS)
    (after,) = sample(styled, ["a cat"], [0], **SETTINGS)
    assert (pixels(after) == before).all()


def test_a_controlnet_guides_regions_and_is_refused_with_tiles(styled, tmp_path):
    edges = tmp_path / "edges.png"
    tiny_controlnet().save_pretrained(tmp_path / "net")
    Image.new("RGB", (16, 16), "white").save(edges)
    guided, inputs = add_plugins(styled, controls=[Control(tmp_path / "net", edges)])
    settings = {**SETTINGS, "inputs": lambda count: inputs(count, (16, 16))}
    painted = paint_regions(guided, [Region((0, 0, 9, 16), "ink"), Region((7, 0, 16, 16), "ink")], "a cat", **settings)
    assert abs(pixels(painted) - plain(guided, "ink", inputs=settings["inputs"])).max() <= 2
    with pytest.raises(UserError, match="ControlNet sees a whole canvas"):
        paint_regions(guided, [], "a cat", width=64, **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"regions": [Region((0, 0, 8, 16), "inc")]}, "no style 'inc'"),
        ({"regions": [Region((0, 0, 8, 17), "ink")]}, r"A region is 0,0,8,17, .* 16 x 16"),
        ({"regions": [Region((8, 0, 8, 16), "ink")]}, "x0 < x1"),
        ({"regions": [Region(Image.new("L", (8, 8), 255), "ink")]}, "mask is 8 x 8 pixels"),
        ({"regions": [Region(Image.new("L", (16, 16)), "ink")]}, "black all over"),
        ({"style": {"ink": 0.5}}, "sum to 1"),
        ({"window": "gauss"}, "no window 'gauss'"),
        ({"overlap": 1.0}, "share from 0 to 0.9"),
    ],
)
def test_what_cannot_be_painted_is_refused(styled, changes, told):
    arguments = {"regions": [], **changes}
    with pytest.raises(UserError, match=told):
        paint_regions(styled, arguments.pop("regions"), "a cat", **arguments, **SETTINGS)


def test_a_stock_model_has_no_styles_for_regions(pipeline):
    with pytest.raises(UserError, match="no styles"):
        paint_regions(pipeline, [Region(WHOLE, "ink")], "a cat", **SETTINGS)
