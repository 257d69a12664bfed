"""Soups of every family, whose layouts differ by more than names."""

import pytest
import torch
from helpers import rewrite, same_weights
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from soup_models import digests, own_cache  # noqa: F401 - fixtures
from tiny_families import TINY, UNETS

from dmm.errors import UserError
from dmm.families import FAMILIES
from dmm.formats.lora import save_kohya_lora
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.soup.cook import cook
from dmm.soup.make import make_soup
from dmm.soup.recipe import SoupRecipe

LATER = [name for name in UNETS if name != "sd1"]
METHODS = ["soup", "weighted_sum", "task_arithmetic", "slerp", "model_stock", "ties", "dare", "dare_ties"]


@pytest.fixture(scope="module", params=LATER)
def models(request, tmp_path_factory):
    """``base``, ``a`` and ``b`` as folders and as single files, in float32; read only."""
    at = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("base", "a", "b")):
        pipe = TINY[request.param](seed)
        pipe.save_pretrained(at / name)
        save_single_file(pipe, at / f"{name}.safetensors")
    return request.param, at


def recipe(at, method="soup", names="ab", suffixes=(".safetensors", ".safetensors"), **more):
    teachers = [
        {"name": name, "model": str(at / f"{name}{suffix}")} for name, suffix in zip(names, suffixes, strict=False)
    ]
    needs_base = method in ("task_arithmetic", "model_stock", "ties", "dare", "dare_ties")
    base = {"base": str(at / f"base{suffixes[0]}")} if needs_base else {}
    return SoupRecipe(method=method, teachers=teachers, **{**base, **more})


@pytest.mark.parametrize("suffix", [".safetensors", ""], ids=["a file", "a folder"])
@pytest.mark.parametrize("output", ["soup.safetensors", "soup"])
def test_a_soup_of_one_model_is_that_model(models, tmp_path, digests, suffix, output):  # noqa: F811
    _, at = models
    made = make_soup(recipe(at, names="a", suffixes=(suffix,)), tmp_path / output, digests=digests)
    assert same_weights(open_pipeline(ModelSource(made.path)), open_pipeline(ModelSource(at / "a")))


@pytest.mark.parametrize("method", METHODS)
def test_it_does_not_matter_what_the_models_are_kept_in(models, tmp_path, digests, method):  # noqa: F811
    _, at = models
    files = make_soup(recipe(at, method), tmp_path / "files.safetensors", digests=digests).path
    mixed = make_soup(
        recipe(at, method, suffixes=("", ".safetensors")), tmp_path / "mixed.safetensors", digests=digests
    ).path
    expected, found = load_file(files), load_file(mixed)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_folder_of_files_is_the_mean(models, tmp_path, digests):  # noqa: F811
    _, at = models
    made = open_pipeline(ModelSource(make_soup(recipe(at), tmp_path / "soup", digests=digests).path))
    a, b = (open_pipeline(ModelSource(at / name)) for name in "ab")
    for component, part in made.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        one, other = (getattr(pipe, component).state_dict() for pipe in (a, b))
        for name, tensor in part.state_dict().items():
            if tensor.is_floating_point():
                assert tensor.equal(((one[name].double() + other[name].double()) / 2).float()), name


def adapted(name, path):
    pipe = TINY[name](seed=1)
    parts = {one.name: getattr(pipe, one.name) for one in FAMILIES[name].components if one.kohya}
    for component, model in parts.items():
        targets = ["to_q", "conv1"] if component == "unet" else ["q_proj", "v_proj", "fc1", "text_projection"]
        model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        torch.manual_seed(5)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.1)
    save_kohya_lora(path, parts, FAMILIES[name])
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ""], ids=["a file", "a folder"])
@pytest.mark.parametrize("output", ["soup.safetensors", "soup"])
def test_a_lora_is_baked_as_it_is_fused(models, tmp_path, digests, suffix, output):  # noqa: F811
    name, at = models
    lora = adapted(name, tmp_path / "lora.safetensors")
    teachers = [{"name": "x", "model": str(at / f"a{suffix}"), "lora": str(lora), "lora_scale": 0.6}]
    made = make_soup(SoupRecipe(method="soup", teachers=teachers), tmp_path / output, digests=digests)
    found = open_pipeline(ModelSource(made.path))
    expected = open_pipeline(ModelSource(at / "a", loras=((lora, 0.6),)))
    assert not same_weights(found, open_pipeline(ModelSource(at / "a")))
    for component, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            for key, tensor in part.state_dict().items():
                torch.testing.assert_close(getattr(found, component).state_dict()[key], tensor, rtol=0, atol=1e-6)


def test_a_lora_comes_out_by_the_familys_names_and_bakes_back(models, tmp_path, digests):  # noqa: F811
    name, at = models
    lora = adapted(name, tmp_path / "lora.safetensors")
    tuned = [{"name": "x", "model": str(at / "a.safetensors"), "lora": str(lora)}]
    made = make_soup(SoupRecipe(method="soup", teachers=tuned), tmp_path / "tuned.safetensors", digests=digests).path
    teachers = [{"name": "x", "model": str(made)}]
    extract = SoupRecipe(kind="lora", method="extract", base=str(at / "a"), teachers=teachers, rank=2, precision="fp32")
    found = cook(extract, tmp_path / "extracted.safetensors").path
    assert {key.split(".")[0] for key in load_file(found)} == {key.split(".")[0] for key in load_file(lora)}
    with safe_open(found, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == FAMILIES[name].kohya_name
    again = open_pipeline(ModelSource(at / "a", loras=((found, 1.0),)))
    expected = open_pipeline(ModelSource(made))
    for component, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            for key, tensor in part.state_dict().items():
                torch.testing.assert_close(getattr(again, component).state_dict()[key], tensor, rtol=0, atol=1e-5)


def test_blocks_have_weights_of_their_own(models, tmp_path, digests):  # noqa: F811
    _, at = models
    blocks = {"BASE": {"a": 0, "b": 1}}
    made = make_soup(recipe(at, "weighted_sum", blocks=blocks), tmp_path / "s.safetensors", digests=digests)
    found, a, b = (load_file(path) for path in (made.path, at / "a.safetensors", at / "b.safetensors"))
    for key in found:
        if found[key].numel() and not key.startswith("model."):
            assert found[key].equal(b[key]), key
    assert not found["model.diffusion_model.out.2.weight"].equal(b["model.diffusion_model.out.2.weight"])
    assert a.keys() == b.keys() == found.keys()


@pytest.mark.parametrize("other", UNETS)
def test_families_are_never_mixed(models, tmp_path, digests, other):  # noqa: F811
    name, at = models
    if other == name:
        return
    save_single_file(TINY[other](), tmp_path / "other.safetensors")
    teachers = [
        {"name": "a", "model": str(at / "a.safetensors")},
        {"name": "b", "model": str(tmp_path / "other.safetensors")},
    ]
    titles = FAMILIES[other].title, FAMILIES[name].title
    with pytest.raises(UserError, match=rf"teacher 'b': \S* is {titles[0]}, teacher 'a' {titles[1]}\. Choose models"):
        make_soup(SoupRecipe(method="soup", teachers=teachers), tmp_path / "s.safetensors", digests=digests)
    assert not (tmp_path / "s.safetensors").exists()


def test_loras_of_two_families_are_never_mixed(models, tmp_path):
    name, _ = models
    teachers = [{"name": one, "lora": str(adapted(one, tmp_path / f"{one}.safetensors"))} for one in ("sd1", name)]
    with pytest.raises(
        UserError, match=r"is a LoRA of SD.*, that of teacher '\w+' of SD.*\. Merge LoRAs of one family"
    ):
        cook(SoupRecipe(kind="lora", method="soup", teachers=teachers), tmp_path / "s.safetensors")


def test_a_file_that_does_not_say_what_it_predicts_follows_its_configs(tmp_path, digests):  # noqa: F811
    # as those of SD 2.x that Stability AI published, of both kinds
    pipe = TINY["sd2"]()
    pipe.save_pretrained(tmp_path / "folder")
    save_single_file(pipe, tmp_path / "says.safetensors")
    rewrite(tmp_path / "says.safetensors", tmp_path / "silent.safetensors", lambda found: found.pop("v_pred"), {})
    silent = {"name": "a", "model": str(tmp_path / "silent.safetensors")}
    one = SoupRecipe(method="soup", teachers=[silent], config=str(tmp_path / "folder"))
    made = make_soup(one, tmp_path / "soup", digests=digests).path
    assert open_pipeline(ModelSource(made)).scheduler.config.prediction_type == "v_prediction"
    made = make_soup(SoupRecipe(method="soup", teachers=[silent]), tmp_path / "soup.safetensors", digests=digests).path
    assert "v_pred" not in load_file(made)
