"""LoRAs out of LoRAs, and out of differences."""

import pytest
import torch
from conftest import tiny_pipeline
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from soup_models import *  # noqa: F403 - fixtures

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.formats.lora import read_lora, save_kohya_lora
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.soup.cook import cook
from dmm.soup.lora import Factors, factorise, truncate_factors
from dmm.soup.recipe import SoupRecipe

TARGETS = ["to_q", "to_k", "conv1"]


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two of rank 2 and 3 in kohya's layout, and the first again as diffusers saves it."""
    folder = tmp_path_factory.mktemp("loras")
    for name, rank in (("a", 2), ("b", 3)):
        pipe = tiny_pipeline()
        torch.manual_seed(rank)
        targets = TARGETS if name == "a" else TARGETS[:2]
        pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=4, init_lora_weights=False, target_modules=targets))
        save_kohya_lora(folder / f"{name}.safetensors", {"unet": pipe.unet}, SD1)
    return folder


def deltas(path):
    pipe = tiny_pipeline()
    layers = read_lora(path, {"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    return {layer.module: layer.rows(0, layer.form.num_rows) for layer in layers}


def merged(loras, output, **keys):
    teachers = [{"name": name, "lora": str(loras / f"{name}.safetensors")} for name in "ab"]
    return cook(SoupRecipe(kind="lora", **{"teachers": teachers, **keys}), output).path


def test_a_lora_of_loras_adds_what_they_add(loras, tmp_path):
    a, b = (deltas(loras / f"{name}.safetensors") for name in "ab")
    found = deltas(merged(loras, tmp_path / "1.safetensors", method="weighted_sum", weights={"a": 3, "b": 1}))
    assert found.keys() == a.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, 0.75 * a[name] + 0.25 * b.get(name, torch.zeros(())))
    found = deltas(merged(loras, tmp_path / "2.safetensors", method="task_arithmetic", weights={"b": -0.5}))
    name = next(iter(b))
    torch.testing.assert_close(found[name], a[name] - 0.5 * b[name])


def test_one_lora_or_equal_ones_come_out_unchanged(loras, tmp_path):
    path = str(loras / "a.safetensors")
    teachers = [{"name": name, "lora": path} for name in "xyz"]
    soup = load_file(merged(loras, tmp_path / "s.safetensors", method="soup", teachers=teachers))
    one = load_file(path)
    assert soup.keys() == one.keys()
    assert all(soup[name].equal(one[name]) for name in one)


def test_a_smaller_rank_is_the_nearest(loras, tmp_path):
    found = deltas(merged(loras, tmp_path / "s.safetensors", method="task_arithmetic", rank=2))
    a, b = (deltas(loras / f"{name}.safetensors") for name in "ab")
    name = next(iter(b))
    left, values, right = torch.linalg.svd((a[name] + b[name]).double())
    expected = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (6, 4, 3, 3)])
def test_factors_are_the_truncated_decomposition(shape):
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    for rank in (1, 3):
        factors, kept = factorise(difference, rank, None)
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(factors.up.flatten(1) @ factors.down.flatten(1), expected)
        assert kept == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))
        assert truncate_factors(factors, rank, None).down.shape == factors.down.shape


def test_energy_chooses_the_rank():
    factors, kept = factorise(torch.diag(torch.tensor([3.0, 2.0, 1.0])), None, 0.9)
    assert len(factors.down) == 2
    assert kept == pytest.approx(13 / 14)
    both = Factors(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2.0)
    assert len(truncate_factors(both, None, 0.9).down) == 2


def test_a_lora_is_extracted_from_what_it_was_fused_into(loras, models, tmp_path):
    fused = open_pipeline(ModelSource(models / "base", loras=((loras / "a.safetensors", 1.0),)))
    fused.save_pretrained(tmp_path / "fused")
    teachers = [{"name": "fused", "model": str(tmp_path / "fused")}]
    keys = {"method": "extract", "base": str(models / "base"), "teachers": teachers, "precision": "fp32"}
    found = deltas(merged(loras, tmp_path / "lora.safetensors", **keys, rank=2))
    expected = deltas(loras / "a.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_extraction_tells_what_a_lora_cannot_carry(models, tmp_path):
    teachers = [{"name": "a", "model": str(models / "a")}]
    recipe = SoupRecipe(
        kind="lora", method="extract", base=str(models / "base"), teachers=teachers, energy=1.0, precision="fp32"
    )
    made = cook(recipe, tmp_path / "lora.safetensors")
    assert made.notes[0].startswith("kept 100.0%")
    assert "that a LoRA does not carry" in made.notes[1]
    lora = ModelSource(models / "base", loras=((made.path, 1.0),))
    a, with_lora = open_pipeline(ModelSource(models / "a")), open_pipeline(lora)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(with_lora.unet.state_dict()[name], a.unet.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_recipes_that_make_no_lora(loras, tmp_path):
    lora = {"name": "a", "lora": str(loras / "a.safetensors")}
    extract = {"method": "extract", "base": "o/b", "teachers": [{"name": "a", "model": "o/m"}]}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    for keys, message in (
        ({"method": "ties", "teachers": [lora]}, "'ties' is not for LoRAs"),
        ({"method": "extract", "teachers": [lora]}, "takes a base and one teacher"),
        ({"method": "soup", "teachers": [{"name": "a", "model": "o/m"}]}, "made of LoRAs"),
        ({**extract, "energy": 0.5, "calibration": {"prompts": prompts}}, "give rank, not energy"),
        ({"method": "soup", "teachers": [lora], "calibration": {"prompts": prompts}}, "for the method 'extract'"),
    ):
        with pytest.raises(ValueError, match=message):
            SoupRecipe(kind="lora", **keys)
    with pytest.raises(UserError, match="a LoRA is one file"):
        cook(SoupRecipe(kind="lora", method="soup", teachers=[lora]), tmp_path / "folder")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (LoraConfig(r=2, lora_bias=True, target_modules=["conv1"]), "changes a bias, too"),
        (LoraConfig(r=2, use_dora=True, target_modules=["conv1"]), "is a DoRA"),
        (LoHaConfig(r=2, target_modules=["conv1"]), "is a LoHa, LoKr, Tucker core or whole difference"),
    ],
    ids=["biases", "DoRA", "LoHa"],
)
def test_what_a_sum_would_lose_is_refused(loras, tmp_path, config, what):
    get_peft_model(tiny_pipeline().unet, config).save_pretrained(tmp_path / "peft")
    teachers = [{"name": "a", "lora": str(loras / "a.safetensors")}, {"name": "b", "lora": str(tmp_path / "peft")}]
    with pytest.raises(UserError, match=f"{what}, and only plain LoRAs add up to a LoRA"):
        merged(loras, tmp_path / "soup.safetensors", method="soup", teachers=teachers)
    assert not (tmp_path / "soup.safetensors").exists()


def test_a_calibrated_lora_of_as_many_bytes_is_nearer_to_its_model(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    calibration = {"prompts": str(tmp_path / "prompts.txt"), "count": 4, "samples": 32, "steps": 2, "guidance": 1}
    teachers = [{"name": "a", "model": str(models / "a")}]
    keys = {"kind": "lora", "method": "extract", "base": str(models / "base"), "teachers": teachers, "rank": 2}
    made = {
        name: cook(SoupRecipe(**keys, precision="fp32", text_encoder="base", **more), tmp_path / f"{name}.safetensors")
        for name, more in (("plain", {}), ("calibrated", {"calibration": {**calibration, "size": 16}}))
    }
    assert made["calibrated"].num_bytes <= made["plain"].num_bytes
    assert "calibrated: " in made["calibrated"].notes[0]
    torch.manual_seed(0)
    x, t, text = torch.randn(16, 4, 8, 8), torch.arange(16) * 60, torch.randn(16, 6, 16)
    teacher = open_pipeline(ModelSource(models / "a")).unet(x, t, encoder_hidden_states=text).sample
    moved = {}
    for name, one in made.items():
        unet = open_pipeline(ModelSource(models / "base", loras=((one.path, 1.0),))).unet
        moved[name] = float((unet(x, t, encoder_hidden_states=text).sample - teacher).square().mean())
    assert moved["calibrated"] < moved["plain"]
