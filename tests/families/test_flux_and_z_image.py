"""What is FLUX.1's and Z-Image's own: painted and exported as diffusers has them, LoRAs of their layouts."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, ZImagePipeline
from safetensors.torch import save_file
from test_flow_merges import recipe_of
from tiny_families import TINY, tiny_flux

import dmm
from dmm.errors import UserError
from dmm.families import FAMILIES
from dmm.formats.lora import read_lora
from dmm.models.styles import StylePrompts
from dmm.pipeline.export import export_style
from dmm.pipeline.sampling import sample, sample_latents
from dmm.pipeline.styled import add_styles
from dmm.recipes.recipe import load_recipe
from dmm.training.preflight import check_merge

CLASSES = {"flux": FluxPipeline, "z_image": ZImagePipeline}
SIZE = {"width": 16, "height": 16}


@pytest.fixture(params=CLASSES)
def name(request):
    return request.param


def pixels(image):
    return np.asarray(image, dtype=int)


def test_it_is_painted_as_diffusers_paints_it(name, tmp_path):
    TINY[name]().save_pretrained(tmp_path / "model")
    plain = CLASSES[name].from_pretrained(tmp_path / "model")
    plain.set_progress_bar_config(disable=True)
    (ours,) = sample(TINY[name](), ["a cat"], [0], steps=4, guidance_scale=3, **SIZE)
    theirs = plain(
        "a cat", generator=torch.Generator().manual_seed(0), num_inference_steps=4, guidance_scale=3, **SIZE
    ).images[0]
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_latents_come_as_a_vae_has_them(name):
    settings = {"steps": 2, "guidance_scale": 3, "negative_prompt": "", "sampler": "Euler", **SIZE}
    (latents,) = sample_latents(TINY[name](), ["a cat"], [0], **settings)
    assert latents.shape == (4, 8, 8)


def test_an_exported_style_opens_in_plain_diffusers(name, tmp_path):
    pipe = TINY[name]()
    torch.manual_seed(3)
    prompts = StylePrompts(["ink", "photo"], dim=32)
    torch.nn.init.normal_(prompts.linear_2.weight, std=2)
    add_styles(pipe, prompts)
    export_style(pipe, "ink", tmp_path / "ink")
    plain = CLASSES[name].from_pretrained(tmp_path / "ink")
    dmm.set_style(pipe, "ink")
    (prompted,) = sample(pipe, ["a cat"], [0], steps=3, **SIZE)
    (baked,) = sample(plain, ["a cat"], [0], steps=3, **SIZE)
    assert np.abs(pixels(baked) - pixels(prompted)).max() <= 2
    dmm.set_style(pipe, None)
    assert np.abs(pixels(next(sample(pipe, ["a cat"], [0], steps=3, **SIZE))) - pixels(prompted)).max() > 2


def test_teachers_that_read_no_guidance_are_refused_beside_a_base_that_does(tmp_path):
    path = recipe_of(tmp_path, "flux", {"rank": 2}, schnell=lambda: tiny_flux(2, guidance=False))
    with pytest.raises(UserError, match=r"'schnell': the transformer has guidance_embeds False, the student True"):
        check_merge(load_recipe(path), 1, torch.device("cpu"), with_digests=False)


def wide_flux():
    """FLUX.1 at its own width, which converters know, without weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def factors(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)


@pytest.mark.parametrize(
    ("layer", "rows", "parts"),
    [
        ("double_blocks.0.img_attn.qkv", 3 * 3072, ["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("single_blocks.0.linear1", 7 * 3072, ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
    ],
)
def test_a_lora_of_kohyas_finds_the_layers_that_its_rows_are(layer, rows, parts, tmp_path):
    down, up = factors(rows, 3072)
    kohya = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    changes = read_lora(tmp_path / "kohya.safetensors", {"transformer": wide_flux()}, FAMILIES["flux"])
    assert [one.module.split(".", 2)[2] for one in changes] == parts
    change = torch.cat([one.rows(0, one.form.num_rows) for one in changes])
    torch.testing.assert_close(change, 0.5 * up @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."], ids=["ai-toolkit", "ComfyUI"])
def test_a_lora_of_z_images_is_read_by_either_naming(prefix, tmp_path):
    model, (down, up) = TINY["z_image"]().transformer, factors(32, 32)
    layer = f"{prefix}layers.0.attention.to_k"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    (change,) = read_lora(tmp_path / "lora.safetensors", {"transformer": model}, FAMILIES["z_image"])
    assert change.module == "layers.0.attention.to_k"
    torch.testing.assert_close(change.rows(0, 32), up @ down)


def test_a_lora_of_another_family_is_refused_with_how_much_of_it_fits(name, tmp_path):
    down, up = factors(8, 8)
    layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=r"none of its 1 layers is one of this model's"):
        read_lora(tmp_path / "sd.safetensors", {"transformer": TINY[name]().transformer}, FAMILIES[name])
