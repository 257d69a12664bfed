"""What a pipeline does is not what its model is: folders of all of a family's classes open, inpainting UNets do not."""

import json

import pytest
from conftest import tiny_pipeline, tiny_unet
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from helpers import same_weights
from plugin_helpers import tiny_controlnet
from safetensors.torch import load_file

from dmm.errors import UserError
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, check_model, open_pipeline
from dmm.soup.make import make_soup
from dmm.soup.reading import Digests
from dmm.soup.recipe import SoupRecipe


def inpainting_model():
    pipe = tiny_pipeline()
    pipe.register_modules(unet=tiny_unet(in_channels=9))
    return pipe


@pytest.mark.parametrize(
    "kind",
    [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionControlNetPipeline],
    ids=lambda kind: kind.__name__,
)
def test_a_folder_of_any_class_of_the_family_opens_and_is_merged(sd1_folder, tmp_path, kind):
    plain = tiny_pipeline()
    more = {"controlnet": tiny_controlnet()} if "ControlNet" in kind.__name__ else {}
    kind(**plain.components, **more, requires_safety_checker=False).save_pretrained(tmp_path / "model")
    opened = open_pipeline(ModelSource(tmp_path / "model"))
    assert type(opened) is type(plain)
    assert same_weights(opened, plain)
    teachers = [{"name": "a", "model": str(tmp_path / "model")}, {"name": "b", "model": str(sd1_folder)}]
    for output in ("soup", "soup.safetensors"):
        recipe = SoupRecipe(method="soup", teachers=teachers)
        made = make_soup(recipe, tmp_path / output, digests=Digests(tmp_path / "digests")).path
        assert same_weights(open_pipeline(ModelSource(made)), plain)
    index = json.loads((tmp_path / "soup/model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert not (tmp_path / "soup/controlnet").exists()
    assert same_weights(StableDiffusionPipeline.from_pretrained(tmp_path / "soup", safety_checker=None), plain)


def test_an_inpainting_model_is_told_what_works(tmp_path):
    pipe = inpainting_model()
    StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False).save_pretrained(
        tmp_path / "folder"
    )
    save_single_file(pipe, tmp_path / "model.safetensors")
    for path in (tmp_path / "folder", tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=r"is an inpainting model: its UNet reads 9 channels.*--mask.*dmm soup"):
            check_model(ModelSource(path))


@pytest.mark.parametrize("made_of", ["", ".safetensors"], ids=["of folders", "of files"])
@pytest.mark.parametrize("suffix", ["", ".safetensors"], ids=["a folder", "a file"])
def test_inpainting_models_are_averaged_with_each_other_as_told(tmp_path, made_of, suffix):
    for name in "ab":
        pipe = inpainting_model()
        pipe.save_pretrained(tmp_path / name)
        save_single_file(pipe, tmp_path / f"{name}.safetensors")
    teachers = [{"name": name, "model": str(tmp_path / f"{name}{made_of}")} for name in "ab"]
    config = None if suffix or not made_of else str(tmp_path / "a")
    made = make_soup(
        SoupRecipe(method="soup", teachers=teachers, config=config),
        tmp_path / f"soup{suffix}",
        digests=Digests(tmp_path / "digests"),
    ).path
    weights = made if suffix else made / "unet/diffusion_pytorch_model.safetensors"
    name = "model.diffusion_model.input_blocks.0.0.weight" if suffix else "conv_in.weight"
    assert load_file(weights)[name].shape[1] == 9
