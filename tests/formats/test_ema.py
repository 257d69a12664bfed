"""The running average of weights in single files: told apart, chosen, taken where there is nothing else."""

import pytest
import torch
from conftest import tiny_unet
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.formats.ema import choose_weights
from dmm.formats.original_layout import original_names
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.soup.make import make_soup
from dmm.soup.reading import Digests
from dmm.soup.recipe import SoupRecipe

TRAINED = "model.diffusion_model."


def average_name(name):
    """As the original code makes it: the model's name without dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def with_average(tensors):
    """Tensors of a checkpoint and, half as large, the average of its UNet's."""
    averages = {average_name(name): tensor / 2 for name, tensor in tensors.items() if name.startswith(TRAINED)}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return {**tensors, **averages, **counters}


def without_trained(tensors):
    return {name: tensor for name, tensor in with_average(tensors).items() if not name.startswith(TRAINED)}


@pytest.fixture
def with_both(sd1_file, tmp_path):
    save_file(with_average(load_file(sd1_file)), tmp_path / "both.safetensors")
    return tmp_path / "both.safetensors"


@pytest.fixture
def average_alone(sd1_file, tmp_path):
    save_file(without_trained(load_file(sd1_file)), tmp_path / "alone.safetensors")
    return tmp_path / "alone.safetensors"


def sd15():
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


@pytest.mark.parametrize("build", [tiny_unet, sd15])
def test_every_name_comes_back_from_the_one_without_dots(build, pipeline):
    unet = build()
    names = set(original_names({**pipeline.components, "unet": unet}, SD1)["unet"].values())
    assert len(names) == len(unet.state_dict())
    chosen = choose_weights("x", [average_name(name) for name in names])
    assert chosen == {name: average_name(name) for name in names}


def scale_of(unet, plain):
    """What all weights of a UNet are, in those of another: one number."""
    scales = {
        round(float((a / b).nanmedian()), 6)
        for a, b in zip(unet.state_dict().values(), plain.state_dict().values(), strict=True)
        if b.any()
    }
    assert len(scales) == 1
    return scales.pop()


def test_the_weights_are_the_trained_ones_or_as_asked_their_average(with_both, average_alone, sd1_folder, pipeline):
    def open_with(path, ema):
        return open_pipeline(ModelSource(path, config=sd1_folder, ema=ema))

    assert scale_of(open_with(with_both, False).unet, pipeline.unet) == 1
    assert scale_of(open_with(with_both, True).unet, pipeline.unet) == 0.5
    assert scale_of(open_with(average_alone, False).unet, pipeline.unet) == 0.5
    for one, other in zip(open_with(with_both, True).vae.parameters(), pipeline.vae.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_pickle_has_an_average_too(with_both, sd1_folder, tmp_path, pipeline):
    torch.save({"state_dict": load_file(with_both)}, tmp_path / "m.ckpt")
    opened = open_pipeline(ModelSource(tmp_path / "m.ckpt", config=sd1_folder, ema=True, allow_pickle=True))
    assert scale_of(opened.unet, pipeline.unet) == 0.5


def test_what_is_asked_for_must_be_there(sd1_file, sd1_folder, with_both, tmp_path):
    with pytest.raises(UserError, match="has no EMA copy of its weights"):
        open_pipeline(ModelSource(sd1_file, config=sd1_folder, ema=True))
    with pytest.raises(UserError, match="is a folder, which has no EMA copy"):
        open_pipeline(ModelSource(sd1_folder, ema=True))
    lacking = load_file(with_both)
    del lacking[average_name(f"{TRAINED}out.2.weight")]
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(UserError, match=r"EMA copy lacks 1 of the .* '.*out\.2\.weight'"):
        open_pipeline(ModelSource(tmp_path / "lacking.safetensors", config=sd1_folder, ema=True))


def test_a_soup_tells_once_of_copies_that_it_leaves_out(sd1_file, with_both, average_alone, tmp_path):
    def soup(name, **teachers):
        given = tuple({"name": one, **what} for one, what in teachers.items())
        recipe = SoupRecipe.model_validate({"method": "soup", "teachers": given})
        made = make_soup(recipe, tmp_path / name, digests=Digests(tmp_path / "digests.json"))
        return load_file(tmp_path / name)[f"{TRAINED}out.2.weight"], made.notes

    plain = load_file(sd1_file)[f"{TRAINED}out.2.weight"]
    weight, notes = soup("1.safetensors", a={"model": str(sd1_file)}, b={"model": str(with_both)})
    assert torch.equal(weight, plain)
    assert notes == ("the EMA copies of teacher 'b' are left out; 'ema: true' takes them instead",)
    weight, notes = soup("2.safetensors", a={"model": str(sd1_file)}, b={"model": str(with_both), "ema": True})
    assert torch.allclose(weight, plain * 0.75)
    assert notes == ()
    weight, notes = soup("3.safetensors", a={"model": str(sd1_file)}, b={"model": str(average_alone)})
    assert torch.allclose(weight, plain * 0.75)
    assert notes == ()
