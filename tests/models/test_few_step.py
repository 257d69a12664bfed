"""The student starts as the merge that it is made of, in every style, told guidance or not."""

import pytest
import torch
from adapter_helpers import some_adapter
from conftest import STYLE_NAMES, tiny_adapted, tiny_pipeline, tiny_styled, tiny_unet

from dmm.families.sd1 import SD1
from dmm.maths.consistency import embed_guidance
from dmm.models.adapters import Adapter
from dmm.models.few_step import (
    TOLD_DIM,
    FewStepStudent,
    add_told,
    fast_layers,
    new_fast,
    style_names_of,
)
from dmm.pipeline.styled import set_style, style_prompts_of

INPUTS = {
    "x_t": torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timesteps": torch.tensor([19, 519, 999]),
    "conditioning": {"encoder_hidden_states": torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))},
}


def one_hot(styles, count=3):
    return torch.eye(count)[torch.tensor(styles)]


def painted(pipe, style):
    """What a pipeline's UNet says in a style, with no code of training."""
    set_style(pipe, style)
    x, t, text = INPUTS["x_t"], INPUTS["timesteps"], INPUTS["conditioning"]
    with torch.no_grad():
        return pipe.unet(x, t, **text, return_dict=False)[0]


@pytest.mark.parametrize("make", [tiny_styled, tiny_adapted])
@torch.no_grad()
def test_the_start_is_the_merge_to_the_bit_whatever_it_is_told(make):
    expected = painted(make(), "photo")
    pipe = make()
    add_told(pipe.unet, SD1)
    student = FewStepStudent(pipe.unet, style_prompts_of(pipe), SD1)
    for told in (None, embed_guidance(torch.tensor([1.0, 3.0, 10.0]), TOLD_DIM)):
        assert torch.equal(student(**INPUTS, style_weights=one_hot([1, 1, 1]), told=told), expected)


@pytest.mark.parametrize("make", [tiny_styled, tiny_adapted])
@torch.no_grad()
def test_each_sample_has_its_own_style(make):
    pipe = make()
    prompts = style_prompts_of(pipe)
    each = [painted(pipe, name)[i] for i, name in enumerate(STYLE_NAMES)]
    set_style(pipe, None)
    mixed = FewStepStudent(pipe.unet, prompts, SD1)(**INPUTS, style_weights=one_hot([0, 1, 2]))
    torch.testing.assert_close(mixed, torch.stack(each), rtol=1e-4, atol=1e-4)


def test_the_layer_is_the_one_that_stock_models_have():
    stock, ours = tiny_unet(time_cond_proj_dim=TOLD_DIM), tiny_unet()
    add_told(ours, SD1)
    shapes = [{name: tensor.shape for name, tensor in unet.state_dict().items()} for unet in (stock, ours)]
    assert shapes[0] == shapes[1]
    assert ours.time_embedding.cond_proj(embed_guidance(torch.tensor([2.0]), TOLD_DIM)).abs().max() == 0


def test_a_fast_lora_has_the_layers_of_lcm_lora():
    pipe = tiny_pipeline()
    targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    expected = {
        name for name in dict(pipe.unet.named_parameters()) if name.removesuffix(".weight").endswith(targets)
    } - {name for name in dict(pipe.unet.named_parameters()) if not name.endswith(".weight")}
    assert set(fast_layers(pipe.unet)) == expected


@pytest.mark.parametrize("styles", [[2, 2, 2], [0, 1, 2]])
@torch.no_grad()
def test_a_new_fast_lora_changes_nothing_and_a_trained_one_adds_to_every_style(styles):
    pipe = tiny_adapted()
    prompts = style_prompts_of(pipe)
    student = FewStepStudent(pipe.unet, prompts, SD1, fast=new_fast(pipe.unet, 2, seed=0))
    asked = {**INPUTS, "style_weights": one_hot(styles)}
    start = student(**asked)
    torch.testing.assert_close(start, student(**asked, with_fast=False), rtol=1e-5, atol=2e-6)
    fast = some_adapter(pipe.unet, 5)
    fast = Adapter({name: fast.factors[name] for name in fast_layers(pipe.unet)}, {})
    student = FewStepStudent(pipe.unet, prompts, SD1, fast=fast)
    said = student(**asked)
    torch.testing.assert_close(student(**asked, with_fast=False), start, rtol=1e-5, atol=2e-6)
    assert (said - start).abs().max() > 0.05
    for name, one in fast.factors.items():
        pipe.unet.get_parameter(name).add_(one.product())
    fused = FewStepStudent(pipe.unet, prompts, SD1)(**asked)
    torch.testing.assert_close(said, fused, rtol=1e-3, atol=1e-3)


def test_what_is_trained_is_the_lora_or_the_weights_and_never_a_style():
    pipe = tiny_adapted()
    unet_names = {f"unet.{name}" for name, _ in pipe.unet.named_parameters()}
    whole = FewStepStudent(pipe.unet, style_prompts_of(pipe), SD1)
    assert {name for name, _ in whole.named_parameters()} == unet_names
    whole(**INPUTS, style_weights=one_hot([1, 1, 1])).sum().backward()
    assert pipe.unet.conv_in.weight.grad.abs().max() > 0
    pipe = tiny_adapted()
    fast = FewStepStudent(pipe.unet, style_prompts_of(pipe), SD1, fast=new_fast(pipe.unet, 2, seed=0))
    assert all(name.startswith("fast.") for name, _ in fast.named_parameters())
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
    fast(**INPUTS, style_weights=one_hot([1, 1, 1])).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in fast.parameters())


def test_a_model_without_styles_has_one_that_stands_for_it():
    assert style_names_of(None) == ["model"]
    assert list(style_names_of(style_prompts_of(tiny_styled()))) == STYLE_NAMES
