"""A style as a LoRA file: on the checkpoint that all styles share, other loaders paint what the style paints."""

import pytest
import torch
from conftest import STYLE_NAMES, tiny_adapted, tiny_pipeline, tiny_unet
from diffusers import StableDiffusionPipeline
from helpers import paint
from safetensors import safe_open
from safetensors.torch import load_file

from dmm.errors import UserError
from dmm.models.styles import StylePrompts, constant_of
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.export import export_all
from dmm.pipeline.style_loras import DIFFUSERS_FOLDER, write_style_loras
from dmm.pipeline.styled import add_styles, set_style, stock_twin, style_prompts_of, style_term

LAYER = "lora_unet_time_embedding_linear_2"  # kohya's spelling, which diffusers, A1111 and ComfyUI know
WIDTH = 256  # of a layer that is wide beside what its input spans


def told(pipe):
    return {name: {"modelspec.title": name} for name in style_prompts_of(pipe).names}


def wide_unet():
    # few frequencies into a wide layer: as SD 1.x, where 320 numbers go into 1280
    torch.manual_seed(3)
    return tiny_unet((8, 16), time_embedding_dim=WIDTH)


@pytest.fixture
def wide():
    """A tiny merged model whose embedding of time has a layer as wide as a real one's is."""
    pipe = tiny_pipeline()
    pipe.register_modules(unet=wide_unet())
    prompts = StylePrompts(STYLE_NAMES, dim=WIDTH)
    torch.nn.init.normal_(prompts.linear_2.weight, std=0.5)
    add_styles(pipe, prompts)
    return pipe


def stock_of(pipe, folder):
    export_all(pipe, folder)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def test_at_real_widths_a_constant_direction_is_exact():
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    pipe.register_modules(unet=tiny_unet((320, 320), norm_num_groups=32))
    direction, error = constant_of(pipe.unet, "time_embedding.linear_2")
    assert error < 1e-5  # at every quarter of a timestep, float32
    assert 0.1 < direction.norm() < 1  # small enough for half precision
    embedding = pipe.unet.time_embedding
    hidden = embedding.act(embedding.linear_1(pipe.unet.time_proj(torch.tensor([0.0, 17.3, 500.0, 999.0]))))
    torch.testing.assert_close(hidden @ direction.float(), torch.ones(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("style", STYLE_NAMES)
def test_a_style_is_a_lora_of_rank_one_that_diffusers_loads(wide, tmp_path, style):
    stock = stock_of(wide, tmp_path / "all")
    made = write_style_loras(wide, tmp_path / "loras", told(wide))
    assert made.are_loras
    file = tmp_path / f"loras/{style}.safetensors"
    assert {name: tuple(tensor.shape) for name, tensor in load_file(file).items()} == {
        f"{LAYER}.lora_down.weight": (1, WIDTH),
        f"{LAYER}.lora_up.weight": (WIDTH, 1),
        f"{LAYER}.alpha": (),
    }
    assert file.stat().st_size < 10_000
    plain = paint(stock)
    set_style(wide, style)
    for loaded in (file, tmp_path / "loras" / DIFFUSERS_FOLDER / file.name):
        stock.load_lora_weights(loaded, adapter_name="style")
        assert abs(paint(stock) - paint(wide)).max() <= 2
        assert abs(paint(stock) - plain).max() > 5
        stock.unload_lora_weights()
    assert (paint(stock) == plain).all()


@torch.no_grad()
def test_pefts_bias_is_exact_to_the_bit_and_a_weight_scales_it(styled, tmp_path):
    stock = stock_of(styled, tmp_path / "all")
    write_style_loras(styled, tmp_path / "loras", told(styled))
    x, steps, text = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.randn(3, 7, 16)
    for style in STYLE_NAMES:
        stock.load_lora_weights(tmp_path / "loras" / DIFFUSERS_FOLDER / f"{style}.safetensors", adapter_name=style)
        stock.set_adapters([style])
        set_style(styled, style)
        assert stock.unet(x, steps, text).sample.equal(styled.unet(x, steps, text).sample)
    stock.set_adapters(["ink"], [0.5])
    embedded = stock.unet.time_embedding(stock.unet.time_proj(steps))
    stock.disable_lora()
    plain = stock.unet.time_embedding(stock.unet.time_proj(steps))
    torch.testing.assert_close(embedded - plain, 0.5 * style_term(styled, "ink").expand(3, -1))


def test_our_own_reader_takes_it_too(wide, tmp_path):
    export_all(wide, tmp_path / "all")
    lora = tmp_path / "all/loras/ink.safetensors"
    fused = open_pipeline(ModelSource(tmp_path / "all", loras=((lora, 1.0),)))
    assert abs(paint(fused) - paint(stock_twin(wide, "ink"))).max() <= 2


def test_where_the_layer_is_too_narrow_the_difference_is_written_and_the_error_told(styled, tmp_path):
    made = write_style_loras(styled, tmp_path / "loras", told(styled))
    assert made.error > 1e-3
    assert not made.are_loras
    for style in STYLE_NAMES:
        assert not (tmp_path / f"loras/{style}.safetensors").exists()
        difference = load_file(tmp_path / f"loras/{style}.diff.safetensors")
        assert difference.keys() == {"diffusion_model.time_embed.2.diff_b"}  # as ComfyUI reads it
        assert difference["diffusion_model.time_embed.2.diff_b"].equal(style_term(styled, style))


def test_a_styles_adapter_is_in_the_same_file(tmp_path):
    pipe = tiny_adapted()
    stock = stock_of(pipe, tmp_path / "all")
    loras = tmp_path / "all/loras"
    for style in STYLE_NAMES:
        lora, rest = (load_file(loras / f"{style}.{kind}") for kind in ("safetensors", "diff.safetensors"))
        assert lora
        assert all(".lora_" in name or name.endswith(".alpha") for name in lora)
        assert all(name.endswith((".diff", ".diff_b")) for name in rest)
        # the patches are whole, adapters or not
        stock.unet.load_state_dict(load_file(tmp_path / f"all/styles/{style}.safetensors"), strict=False)
        set_style(pipe, style)
        assert abs(paint(stock) - paint(pipe)).max() <= 2
        stock = StableDiffusionPipeline.from_pretrained(tmp_path / "all", safety_checker=None)


def test_headers_say_what_it_is(wide, tmp_path):
    export_all(wide, tmp_path / "all", single_file=True)
    for file in (tmp_path / "all/loras/ink.safetensors", tmp_path / "all/loras/diffusers/ink.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert metadata["modelspec.title"] == "DMM merge: ink=1"
    with safe_open(tmp_path / "all/loras/ink.safetensors", "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.lora"
        assert opened.metadata()["ss_network_dim"] == "1"


def test_a_term_that_is_not_finite_is_refused(wide, tmp_path):
    style_prompts_of(wide).linear_2.weight.data *= 1e39
    with pytest.raises(UserError, match="the style 'ink'"):
        write_style_loras(wide, tmp_path / "loras", told(wide))
