"""What a pipeline does is not what its model is: folders of all of a family's classes open, inpainting UNets do not."""

import pytest
from conftest import tiny_pipeline, tiny_unet
from safetensors.torch import load_file

from dmm.errors import UserError
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, check_model
from dmm.soup.make import make_soup
from dmm.soup.reading import Digests
from dmm.soup.recipe import SoupRecipe


def inpainting_model():
    pipe = tiny_pipeline()
    pipe.register_modules(unet=tiny_unet(in_channels=9))
    return pipe


def test_an_inpainting_model_is_told_what_works(tmp_path):
    pipe = inpainting_model()
    pipe.save_pretrained(tmp_path / "folder")
    save_single_file(pipe, tmp_path / "model.safetensors")
    for path in (tmp_path / "folder", tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=r"is an inpainting model: its UNet reads 9 channels.*--mask.*dmm soup"):
            check_model(ModelSource(path))


@pytest.mark.parametrize("suffix", ["", ".safetensors"], ids=["folders", "files"])
def test_inpainting_models_are_averaged_with_each_other_as_told(tmp_path, suffix):
    for name in "ab":
        pipe = inpainting_model()
        pipe.save_pretrained(tmp_path / name)
        save_single_file(pipe, tmp_path / f"{name}.safetensors")
    teachers = [{"name": name, "model": str(tmp_path / f"{name}{suffix}")} for name in "ab"]
    made = make_soup(
        SoupRecipe(method="soup", teachers=teachers), tmp_path / f"soup{suffix}", digests=Digests(tmp_path / "digests")
    ).path
    weights = made if suffix else made / "unet/diffusion_pytorch_model.safetensors"
    name = "model.diffusion_model.input_blocks.0.0.weight" if suffix else "conv_in.weight"
    assert load_file(weights)[name].shape[1] == 9
