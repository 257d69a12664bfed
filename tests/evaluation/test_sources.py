"""Which models an evaluation takes, by what a user names, the recipes and the side-car."""

import json
import shutil

import pytest
import torch

from dmm.cli.evaluate import _teacher
from dmm.errors import UserError
from dmm.evaluation.known_teachers import NamedTeacher
from dmm.evaluation.sources import find_models
from dmm.files.digest import sha256
from dmm.pipeline.removal import remove_style
from dmm.recipes.recipe import load_recipe, save_recipe

CPU = torch.device("cpu")


@pytest.fixture
def lora(tmp_path, pipeline):
    """A LoRA of the tiny UNet, in diffusers' layout."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline.unet.save_lora_adapter(tmp_path / "peft")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "peft" / "pytorch_lora_weights.safetensors")
    save_file({f"unet.{name}": one for name, one in tensors.items()}, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.fixture
def model(merged, sd1_folder, sd1_file, lora, tmp_path):
    """A merged model whose recipe and side-car tell the truth."""
    folder = shutil.copytree(merged, tmp_path / "merged")
    (tmp_path / "recipe.yaml").write_text(
        f"base: {sd1_folder}\nteachers:\n- {{name: ink, model: {sd1_folder}}}\n- {{name: photo, model: {sd1_file}}}\n"
        f"- {{name: clay, lora: {lora}, lora_scale: 0.4, clip_skip: 1, prediction_type: epsilon}}\n"
        f"data: {{images: {tmp_path}}}\nsize: 16\n"
    )
    save_recipe(load_recipe(tmp_path / "recipe.yaml"), folder / "recipe.yaml")
    told = json.loads((folder / "styles" / "styles.json").read_text())["styles"]
    unet = sd1_folder / "unet" / "diffusion_pytorch_model.safetensors"
    sources = (str(sd1_folder), str(sd1_file), f"{lora} at 0.4 on {sd1_folder}")
    for one, source, file in zip(told, sources, (unet, sd1_file, lora), strict=True):
        one |= {"source": source, "sha256": sha256(file), "prediction_type": "epsilon"}
    (folder / "styles" / "styles.json").write_text(json.dumps({"styles": told}))
    return folder


def test_a_named_teacher_keeps_what_the_recipe_says_of_it(model, lora, tmp_path):
    moved = shutil.copy(lora, tmp_path / "moved.safetensors")
    lora.unlink()
    clay = find_models(str(model), {"clay": NamedTeacher(str(moved))}, None, CPU).teachers["clay"]
    assert " at 0.4 on " in clay.source
    assert clay.clip_skip == 1
    scaled = find_models(str(model), {"clay": NamedTeacher(str(moved), 0.7)}, None, CPU).teachers["clay"]
    assert " at 0.7 on " in scaled.source


def test_another_model_than_the_one_that_was_merged_is_told_with_both(model, sd1_file, sd1_folder):
    models = find_models(str(model), {"ink": NamedTeacher(str(sd1_file))}, None, CPU)
    (note,) = models.notes
    merged = sha256(sd1_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert sha256(sd1_file)[:10] in note
    assert merged[:10] in note
    assert find_models(str(model), {"ink": NamedTeacher(str(sd1_folder))}, None, CPU).notes == ()


def test_what_is_no_lora_has_no_scale(model, sd1_file):
    with pytest.raises(UserError, match=r"no LoRA, so that it has no scale; leave out ':0\.5'"):
        find_models(str(model), {"ink": NamedTeacher(str(sd1_file), 0.5)}, None, CPU)


def test_without_a_recipe_the_side_car_knows_all_teachers(model, sd1_folder):
    (model / "recipe.yaml").unlink()
    models = find_models(str(model), {}, str(sd1_folder), CPU)
    assert list(models.teachers) == ["ink", "photo", "clay"]
    assert " at 0.4 on " in models.teachers["clay"].source


def test_after_a_style_was_removed_the_others_are_known(model, tmp_path):
    remove_style(str(model), "photo", tmp_path / "two")
    models = find_models(str(tmp_path / "two"), {}, None, CPU)
    assert list(models.teachers) == ["ink", "clay"]
    # what only the recipe says
    assert models.teachers["clay"].clip_skip == 1
    assert models.base is not None
    assert models.recipe == find_models(str(model), {}, None, CPU).recipe


def test_a_removal_over_another_model_leaves_no_recipe_of_that_one(merged, model, tmp_path):
    remove_style(str(model), "photo", tmp_path / "two")
    remove_style(str(merged), "photo", tmp_path / "two", overwrite=True)
    assert not (tmp_path / "two" / "recipe.yaml").exists()


def test_after_an_addition_the_earlier_teachers_are_known_by_their_own_recipe(model, sd1_folder, lora, tmp_path):
    further = shutil.copytree(model, tmp_path / "further")
    (tmp_path / "add.yaml").write_text(
        f"earlier: {{model: {model}}}\nteachers: [{{name: photo, model: {sd1_folder}}}]\n"
        f"data: {{images: {tmp_path}}}\nsize: 16\n"
    )
    save_recipe(load_recipe(tmp_path / "add.yaml"), further / "recipe.yaml")
    told = json.loads((further / "styles" / "styles.json").read_text())
    told["styles"][1] |= {"source": str(sd1_folder), "sha256": told["styles"][0]["sha256"]}
    (further / "styles" / "styles.json").write_text(json.dumps(told))
    models = find_models(str(further), {}, None, CPU)
    assert list(models.teachers) == ["ink", "photo", "clay"]
    assert models.teachers["clay"].clip_skip == 1
    assert models.teachers["photo"].source == models.base.source == str(sd1_folder)


def test_how_a_scale_is_written(tmp_path):
    assert _teacher("ink=a/b.safetensors:0.5") == ("ink", ("a/b.safetensors", 0.5))
    assert _teacher("ink=a/b") == ("ink", ("a/b", None))
    odd = tmp_path / "x:1"
    odd.mkdir()
    assert _teacher(f"ink={odd}") == ("ink", (str(odd), None))
