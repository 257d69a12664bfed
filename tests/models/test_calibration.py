import pytest
import torch
from conftest import tiny_unet

from dmm.models.calibration import Noised, calibrated_components, layers_of
from dmm.models.teachers import freeze


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return freeze(tiny_unet())


@pytest.fixture(scope="module")
def differences(teacher):
    generator = torch.Generator().manual_seed(1)
    return {name: 0.05 * torch.randn(one.shape, generator=generator) for name, one in teacher.named_parameters()}


def batches(num=6):
    generator = torch.Generator().manual_seed(2)
    for _ in range(num):
        x_t = torch.randn(4, 4, 8, 8, generator=generator)
        timesteps = torch.randint(0, 1000, (4,), generator=generator)
        text = torch.randn(4, 6, 16, generator=generator)
        yield Noised(x_t, timesteps, {"encoder_hidden_states": text})


@pytest.fixture(scope="module")
def components(teacher, differences):
    return dict(calibrated_components(teacher, differences.__getitem__, batches, seed=0))


def test_every_layer_is_found_and_whole(teacher, differences, components):
    assert components.keys() == layers_of(teacher).keys()
    for name, found in components.items():
        torch.testing.assert_close(found.up @ found.down, differences[name].flatten(1), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def move(teacher, name, left):
    """How far the output moves, squared, over all samples, when a layer's weight has this less."""
    weight = teacher.get_parameter(name)
    moved = 0.0
    for batch in batches():
        said = [teacher(batch.x_t, batch.timesteps, **batch.conditioning, return_dict=False)[0]]
        kept = weight.clone()
        weight -= left.view_as(weight)
        said.append(teacher(batch.x_t, batch.timesteps, **batch.conditioning, return_dict=False)[0])
        weight.copy_(kept)
        moved += float((said[0] - said[1]).double().square().sum())
    return moved


@pytest.mark.parametrize("name", ["conv_in.weight", "mid_block.resnets.0.conv1.weight", "conv_out.weight"])
def test_the_first_components_are_what_the_output_needs_most(teacher, differences, components, name):
    found, difference = components[name], differences[name].flatten(1)
    rank = 2
    values = torch.linalg.svd(difference, full_matrices=False)
    plain = values[0][:, :rank] * values[1][:rank] @ values[2][:rank]
    ours = found.cut(rank).up @ found.cut(rank).down
    assert move(teacher, name, difference - ours) < move(teacher, name, difference - plain)


def test_passes_of_a_few_layers_find_the_same(teacher, differences, components):
    again = calibrated_components(teacher, differences.__getitem__, batches, seed=0, max_bytes=200_000)
    for name, found in again:
        torch.testing.assert_close(found.gains, components[name].gains, rtol=1e-4, atol=1e-9)


def test_in_half_precision_it_finds_about_the_same(teacher, differences, components):
    with torch.autocast("cpu", torch.bfloat16):
        again = dict(calibrated_components(teacher, differences.__getitem__, batches, seed=0))
    for name, found in again.items():
        torch.testing.assert_close(found.gains.sum(), components[name].gains.sum(), rtol=0.05, atol=0)


def test_what_does_not_differ_is_left_out(teacher, differences):
    some = {name: one if name == "conv_in.weight" else torch.zeros_like(one) for name, one in differences.items()}
    assert [name for name, _ in calibrated_components(teacher, some.__getitem__, batches, seed=0)] == ["conv_in.weight"]


def test_the_teacher_stays_as_it_is(teacher, components):
    assert not any(module._forward_hooks for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
