"""Soups of folders whose models have a transformer: exact, with LoRAs, and LoRAs out of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from soup_models import digests, own_cache  # noqa: F401 - fixtures
from tiny_families import TINY, UNETS

from dmm.errors import UserError
from dmm.families import FAMILIES, denoiser_of
from dmm.files.json import read_json
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.soup.cook import cook
from dmm.soup.make import make_soup
from dmm.soup.recipe import SoupRecipe


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in UNETS])
def models(request, tmp_path_factory):
    """``a`` and ``b`` as folders; read only."""
    at = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate("ab"):
        TINY[request.param](seed).save_pretrained(at / name)
    return at


def teachers(at, names="ab", **more):
    return [{"name": name, "model": str(at / name), **more} for name in names]


def opened(path, *loras):
    return denoiser_of(open_pipeline(ModelSource(path, loras=tuple((lora, 1.0) for lora in loras)))).state_dict()


def new_lora(at, path):
    """In diffusers' layout, on some of the layers of ``a``."""
    torch.manual_seed(5)
    tensors = {}
    for name, weight in opened(at / "a").items():
        if name.endswith("to_q.weight"):
            layer = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(2, weight.shape[1]) / 8
            tensors[f"{layer}.lora_B.weight"] = torch.randn(len(weight), 2) / 8
    save_file(tensors, path)
    return path


def test_it_is_the_mean_and_says_no_more_than_its_family_reads(models, tmp_path, digests):  # noqa: F811
    made = make_soup(SoupRecipe(method="soup", teachers=teachers(models)), tmp_path / "soup", digests=digests).path
    a, b, found = (opened(path) for path in (models / "a", models / "b", made))
    for name, tensor in found.items():
        assert tensor.equal(((a[name].double() + b[name].double()) / 2).float()), name
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert read_json(made / file).keys() == read_json(models / "a" / file).keys()


def test_a_lora_is_baked_as_it_is_fused_and_comes_out_again(models, tmp_path, digests):  # noqa: F811
    lora = new_lora(models, tmp_path / "lora.safetensors")
    recipe = SoupRecipe(method="soup", teachers=teachers(models, "a", lora=str(lora)))
    baked = make_soup(recipe, tmp_path / "baked", digests=digests).path
    expected, found = opened(models / "a", lora), opened(baked)
    assert not all(tensor.equal(expected[name]) for name, tensor in opened(models / "a").items())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    (changed,) = [{"name": "x", "model": str(baked)}]
    recipe = SoupRecipe(
        kind="lora", method="extract", base=str(models / "a"), teachers=[changed], rank=2, precision="fp32"
    )
    out = cook(recipe, tmp_path / "out.safetensors").path
    assert load_file(out).keys() == load_file(lora).keys()
    for name, tensor in opened(models / "a", out).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("soup.safetensors", {}, "is a folder, and the soup a single file"),
        (
            "soup",
            {"method": "weighted_sum", "blocks": {"IN00": {"a": 0.5}}},
            "'IN00' is a block of a UNet, which these models have none of",
        ),
        (
            "soup",
            {"method": "weighted_sum", "mbw": {"a": [0.1, 1]}},
            "its weights are those of a UNet's blocks, which these models have none of",
        ),
    ],
)
def test_what_is_a_unets_alone_is_refused(models, tmp_path, digests, output, more, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        make_soup(
            SoupRecipe(**{"method": "soup", "teachers": teachers(models), **more}), tmp_path / output, digests=digests
        )
    assert not (tmp_path / output).exists()
