"""A style in a layer without a bias, as FLUX.2, Cosmos and Anima have it: a change of its weight of rank one."""

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from dmm.errors import UserError
from dmm.models.adapters import NOTHING, KeptWeights
from dmm.models.styles import StylePrompts, attach_styles, bake, constant_of, term_change

PORT = "embedder.linear_2"
TIMES = torch.cat([torch.rand(200, generator=torch.Generator().manual_seed(1)) * 1000, torch.tensor([0.0, 1000.0])])


class Embedding(nn.Module):
    """FLUX.2's embedding of the timestep, at a width."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedder = TimestepEmbedding(256, width, sample_proj_bias=False)

    def forward(self, timesteps):
        return self.embedder(self.time_proj(timesteps))


@pytest.fixture(scope="module")
def klein():
    return Embedding(3072)  # as FLUX.2 klein 4B has it


def prompted(model, term):
    attach_styles(model, StylePrompts(["a"], dim=0), PORT)
    linear = model.get_submodule(PORT)
    linear.term = term
    with torch.no_grad():
        return model(TIMES)


@torch.no_grad()
def test_at_real_widths_baked_is_prompted(klein):
    term = 0.5 * torch.randn(3072, generator=torch.Generator().manual_seed(2))
    stock, expected = klein(TIMES), prompted(klein, term)
    assert expected.equal(stock + term)
    weight = klein.get_parameter(f"{PORT}.weight")
    before = weight.clone()
    bake(klein, term, PORT)
    assert type(klein.get_submodule(PORT)) is nn.Linear
    # fp32: sums of 3072 products
    torch.testing.assert_close(klein(TIMES), expected, rtol=0, atol=4e-6)
    assert (klein(TIMES) - expected).pow(2).mean().sqrt() < 1e-6
    weight.copy_(before)


def test_the_direction_is_short_enough_for_half_precision(klein):
    direction, error = constant_of(klein, PORT)
    assert error < 2e-6
    assert direction.norm() < 0.5


@torch.no_grad()
def test_in_bfloat16_it_costs_no_more_than_rounding_the_weights(klein):
    term = 0.5 * torch.randn(3072, generator=torch.Generator().manual_seed(2))
    stock, weight = klein(TIMES), klein.get_parameter(f"{PORT}.weight")
    before = weight.clone()
    weight.copy_(before.bfloat16())
    rounding = (klein(TIMES) - stock).abs().max()
    weight.copy_(before)
    bake(klein, term, PORT)
    weight.copy_(weight.bfloat16())
    assert (klein(TIMES) - stock - term).abs().max() < 1.5 * rounding
    weight.copy_(before)


@torch.no_grad()
def test_adapters_are_calibrated_on_the_same_change_and_it_is_undone_to_the_bit(klein):
    term = torch.randn(3072, generator=torch.Generator().manual_seed(2))
    stock, kept = klein(TIMES), KeptWeights()
    kept.fuse(klein, term_change(klein, term, PORT))
    torch.testing.assert_close(klein(TIMES), stock + term, rtol=0, atol=1e-5)
    kept.fuse(klein, NOTHING)
    assert klein(TIMES).equal(stock)


def test_a_layer_that_is_too_narrow_is_refused():
    with pytest.raises(UserError, match=r"has no bias, and with 32 numbers is too narrow .* \(the error would be \d"):
        bake(Embedding(32), torch.ones(32), PORT)


@torch.no_grad()
def test_a_term_broadcasts_over_axes_between(klein):
    linear = nn.ModuleDict({"port": nn.Linear(4, 6)})
    attach_styles(linear, StylePrompts(["a"], dim=0), "port")
    x, terms = torch.randn(2, 5, 4), torch.randn(2, 6)
    stock = linear["port"](x)
    linear["port"].term = terms
    assert linear["port"](x).equal(stock + terms[:, None])
