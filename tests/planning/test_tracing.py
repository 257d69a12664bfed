"""A run without numbers takes what a run with them does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmm.planning.tracing import Imitated, Meter


def test_what_is_freed_counts_no_more():
    with Meter() as meter:
        one = torch.empty(100, device="meta") + 1
        two = one * 2
        assert meter.now == 800
        del one
        assert meter.now == 400
    assert meter.peak == 800
    assert two.shape == (100,)


def test_views_take_nothing():
    with Meter() as meter:
        made = torch.empty(4, 4, device="meta")
        kept = [made.flatten(), made[0], made.mT]
    assert meter.now == 64
    assert len(kept) == 3


def test_a_product_is_two_flops_an_element_and_its_gradients_are_as_much_each():
    layer = nn.Linear(8, 16, device="meta")
    with Meter() as meter, Imitated(None, on_gpu=False):
        output = layer(torch.empty(4, 8, device="meta", requires_grad=True))
        assert meter.flops == 2 * 4 * 8 * 16
        torch.autograd.backward([output.sum()])
    assert meter.flops == 3 * 2 * 4 * 8 * 16


def test_attention_keeps_no_matrix():
    query = torch.empty(1, 2, 512, 8, device="meta", requires_grad=True)
    with Meter() as meter, Imitated(None, on_gpu=False):
        F.scaled_dot_product_attention(query, query, query)
    assert meter.peak < 512 * 512
    assert meter.flops == 4 * 2 * 512 * 512 * 8


@pytest.mark.parametrize(("on_gpu", "norm"), [(True, torch.float32), (False, torch.bfloat16)])
def test_precision_is_chosen_as_autocast_does(on_gpu, norm):
    x = torch.empty(2, 8, device="meta")
    with Imitated(torch.bfloat16, on_gpu=on_gpu):
        y = F.linear(x, torch.empty(8, 8, device="meta"))
        assert y.dtype == torch.bfloat16
        assert F.layer_norm(y, (8,)).dtype == norm


def test_on_a_cpu_it_is_what_the_real_autocast_keeps():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1))

    def kept(imitated):
        saved = {}

        def pack(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        model = layers.to_empty(device="meta") if imitated else layers
        x = torch.empty(2, 3, 16, 16, device="meta" if imitated else "cpu")
        precision = (
            Imitated(torch.bfloat16, on_gpu=False)
            if imitated
            else torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
            output = model(x)
        assert output.dtype == torch.bfloat16
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    # but for the precision of a norm's few statistics
    assert kept(imitated=False) == pytest.approx(kept(imitated=True), rel=0.01)
