"""``dmm merge --new``: a recipe for what is in a folder; it says what it leaves out and why, and runs as it stands."""

import shutil

import pytest
import torch
from conftest import tiny_pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dmm.cli import main
from dmm.families.sd1 import SD1
from dmm.formats.lora import save_kohya_lora
from dmm.formats.single_file import save_single_file
from dmm.planning.finding import Contents, Found, base_of_all, find_models
from dmm.recipes.recipe import load_recipe


@pytest.fixture(scope="module")
def models(sd1_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(sd1_folder, folder / "some-base")
    tiny_pipeline(1).save_pretrained(folder / "ink")
    save_single_file(tiny_pipeline(2), folder / "clay (v2).safetensors")
    shutil.copyfile(folder / "clay (v2).safetensors", folder / "copy of clay.safetensors")
    save_single_file(tiny_pipeline(3, "v_prediction"), folder / "velocity.safetensors")
    adapted = tiny_pipeline()
    torch.manual_seed(3)
    adapted.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    save_kohya_lora(folder / "photo.safetensors", {"unet": adapted.unet}, SD1)
    save_file({"some.weight": torch.zeros(2, 2)}, folder / "strange.safetensors")
    return folder


def test_it_tells_what_can_be_merged_from_what_cannot(models, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    assert main(["merge", "--new", str(models), "--output", str(path)]) == 0
    recipe, text = load_recipe(path), path.read_text()
    assert recipe.base == str(models / "some-base")
    assert recipe.start == "base"
    assert {teacher.name for teacher in recipe.teachers} == {"ink", "clay -v2", "photo"}
    assert [teacher.lora is not None for teacher in recipe.teachers].count(True) == 1
    assert "# The base: its name says so." in text
    assert "#   copy of clay.safetensors: the same as clay (v2).safetensors, byte by byte" in text
    assert "#   velocity.safetensors: predicts v_prediction" in text
    assert "#   strange.safetensors: none of its 1 tensors has a name that we know" in text
    assert (tmp_path / "prompts.txt").is_file()
    assert f"Wrote {path}: " in capsys.readouterr().out
    assert main(["plan", str(path), "--set", "size=16", "--device", "cpu"]) == 0
    assert main(["merge", "--new", str(models), "--output", str(path)]) == 2  # it is there


def test_without_a_base_the_student_starts_as_the_average(tmp_path, capsys):
    for seed, name in enumerate(("clay", "ink")):
        tiny_pipeline(seed).save_pretrained(tmp_path / name)
    (tmp_path / "my prompts.txt").write_text("a cat\n")
    assert main(["merge", "--new", str(tmp_path)]) == 0
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.start, recipe.base) == ("average", str(tmp_path / "clay"))
    assert [teacher.name for teacher in recipe.teachers] == ["clay", "ink"]
    assert recipe.data.synthesize.prompts == tmp_path / "my prompts.txt"


@pytest.mark.parametrize(
    ("name", "is_base"),
    [
        *((name, True) for name in ("sd15", "SD-1.5", "sd_xl", "sdxl", "sd2.1", "stable-diffusion-v1-5", "model_base")),
        *((name, True) for name in ("v1-5-pruned-emaonly", "stable diffusion")),
        *((name, False) for name in ("ink_sd15", "sdxl-photo", "basement", "sd15 toon", "SDGirls", "sd_v15anime")),
    ],
)
def test_a_base_is_told_by_its_name(name, is_base, tmp_path):
    models = [Found(tmp_path / f"{one}.safetensors", "sd1", {}) for one in ("x", name)]
    base, why = base_of_all(Contents(models, [], {}, None, None))
    assert (base is not None and base.path.stem == name and why == "its name says so") == is_base


def test_a_lora_knows_what_it_was_trained_on(models, tmp_path):
    for name in ("one", "two"):
        save_single_file(tiny_pipeline(len(name) + ord(name[0])), tmp_path / f"{name}.safetensors")
    lora = load_file(models / "photo.safetensors")
    save_file(lora, tmp_path / "photo.safetensors", {"ss_sd_model_name": "two.safetensors"})
    base, why = base_of_all(find_models(tmp_path))
    assert base.path.name == "two.safetensors"
    assert why == "photo.safetensors says that it was trained on it"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new", "none"], "'none' is no folder"),
        (["--new", "."], "holds 0 LoRAs and no model"),
        (["--new", ".", "--resume"], "--new writes a recipe"),
        ([], "RECIPE.yaml is missing"),
        (["recipe.yaml"], "--output DIR is missing"),
    ],
)
def test_what_it_refuses(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    if "--new" in arguments:
        (tmp_path / "recipe.yaml").unlink()
    assert main(["merge", *arguments]) == 2
    assert message in capsys.readouterr().err
