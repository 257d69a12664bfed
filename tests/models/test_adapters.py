import pytest
import torch
from adapter_helpers import some_adapter
from conftest import tiny_unet

from dmm.models.adapters import NOTHING, KeptWeights, mix_adapters
from dmm.models.student import AdaptedStudent
from dmm.models.unfused import changes_of, set_changes


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return tiny_unet().requires_grad_(False).eval()


@pytest.fixture
def adapters(unet):
    return [some_adapter(unet, 1, rank=2), some_adapter(unet, 2, rank=3)]


INPUTS = {
    "sample": torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([3, 700, 1, 50]),
    "encoder_hidden_states": torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1)),
}


@torch.no_grad()
def say(unet):
    return unet(**INPUTS, return_dict=False)[0]


def weights_of(unet):
    return {name: parameter.clone() for name, parameter in unet.named_parameters()}


def is_same(before, unet):
    return all(torch.equal(before[name], parameter) for name, parameter in unet.named_parameters())


def test_a_fused_weight_is_the_shared_one_and_its_change(unet, adapters):
    before = weights_of(unet)
    KeptWeights().fuse(unet, adapters[0])
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter, before[name] + adapters[0].change(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fusing_comes_back_to_the_bit_whatever_was_fused_between(unet, adapters, dtype):
    unet.to(dtype)
    before, kept = weights_of(unet), KeptWeights()
    for adapter in (adapters[0], adapters[1], mix_adapters([(0.3, adapters[0]), (0.7, adapters[1])])):
        kept.fuse(unet, adapter)
        assert not is_same(before, unet)
    kept.fuse(unet, NOTHING)
    assert is_same(before, unet)


def test_fusing_one_after_another_is_fusing_the_last(unet, adapters):
    kept = KeptWeights()
    kept.fuse(unet, adapters[1])
    expected = weights_of(unet)
    kept.fuse(unet, adapters[0])
    kept.fuse(unet, adapters[1])
    assert is_same(expected, unet)


def test_a_mix_changes_what_its_parts_do_each_times_its_weight(unet, adapters):
    mixed = mix_adapters([(0.3, adapters[0]), (0.7, adapters[1])])
    for name in mixed.factors:
        expected = 0.3 * adapters[0].change(name) + 0.7 * adapters[1].change(name)
        torch.testing.assert_close(mixed.change(name), expected)
    for name in mixed.offsets:
        torch.testing.assert_close(mixed.change(name), 0.3 * adapters[0].change(name) + 0.7 * adapters[1].change(name))


def test_a_style_an_image_is_each_style_fused(unet, adapters):
    plain, kept, fused = say(unet), KeptWeights(), []
    for adapter in adapters:
        kept.fuse(unet, adapter)
        fused.append(say(unet))
    kept.fuse(unet, NOTHING)
    # two images, and two parts of guidance; and the last one without a style
    for index, expected in (
        ([0, 1], [fused[0][0], fused[1][1], fused[0][2], fused[1][3]]),
        ([1, 0, 1, 2], [fused[1][0], fused[0][1], fused[1][2], plain[3]]),
    ):
        set_changes(unet, changes_of([*adapters, NOTHING], torch.tensor(index)))
        torch.testing.assert_close(say(unet), torch.stack(expected), rtol=1e-4, atol=1e-5)
    set_changes(unet, changes_of([adapters[0]]))
    torch.testing.assert_close(say(unet), fused[0], rtol=1e-4, atol=1e-5)
    set_changes(unet, {})
    assert torch.equal(say(unet), plain)


def test_as_many_styles_as_images(unet, adapters):
    set_changes(unet, changes_of(adapters, torch.tensor([0, 1, 0])))
    with pytest.raises(ValueError, match="3 styles were set, one for each image, and the model is given a batch of 4"):
        say(unet)
    # a failure leaves the norms their weights
    set_changes(unet, {})
    assert all(parameter is not None for parameter in unet.parameters())
    assert unet.conv_norm_out.weight is not None


def forward(student, style_weights):
    text = {"encoder_hidden_states": INPUTS["encoder_hidden_states"]}
    return student(INPUTS["sample"], INPUTS["timestep"], text, style_weights)


def test_a_student_says_what_its_styles_say(unet, adapters):
    kept, fused = KeptWeights(), []
    for adapter in adapters:
        kept.fuse(unet, adapter)
        fused.append(say(unet))
    kept.fuse(unet, NOTHING)
    both = AdaptedStudent(unet, {"ink": adapters[0], "photo": adapters[1]})
    said = forward(both, torch.eye(2)[[0, 1, 1, 0]]).prediction
    expected = torch.stack([fused[0][0], fused[1][1], fused[1][2], fused[0][3]])
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
    one = AdaptedStudent(unet, {"ink": adapters[0]})
    torch.testing.assert_close(forward(one, torch.ones(4, 1)).prediction, fused[0], rtol=1e-4, atol=1e-5)


def test_only_the_adapter_of_a_frozen_model_is_trained(unet, adapters):
    before = weights_of(unet)
    student = AdaptedStudent(unet, {"ink": adapters[0]})
    assert sum(one.numel() for one in student.parameters()) == adapters[0].num_parameters
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
        student.zero_grad()
        forward(student, torch.ones(4, 1)).prediction.square().mean().backward()
        gradients = {name: one.grad.clone() for name, one in student.named_parameters()}
        if not checkpointed:
            expected = gradients
    assert is_same(before, unet)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
        assert gradient.abs().sum() > 0, name


def test_shared_weights_are_trained_beside_adapters_where_asked(unet, adapters):
    student = AdaptedStudent(unet, {"ink": adapters[0], "photo": adapters[1]}, train_shared=True)
    forward(student, torch.eye(2)[[0, 1, 1, 0]]).prediction.square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
    assert all(parameter.grad is not None for parameter in student.adapters.parameters())


def test_a_students_adapter_is_what_it_began_with_until_it_learns(unet, adapters):
    student = AdaptedStudent(unet, {"ink": adapters[0]})
    found = student.adapter("ink")
    for name in (*found.factors, *found.offsets):
        assert torch.equal(found.change(name), adapters[0].change(name))
