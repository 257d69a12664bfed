import re
from pathlib import Path

import pytest
from conftest import tiny_pipeline
from diffusers import StableDiffusionXLImg2ImgPipeline
from tiny_families import TINY, tiny_sdxl

import dmm
from dmm.errors import UserError
from dmm.families import FAMILIES, components_of, denoiser_of, family_of, family_of_class, family_of_names
from dmm.families.sd1 import SD1
from dmm.families.sd2 import SD2
from dmm.families.sdxl import SDXL
from dmm.formats.folder import family_of_folder
from dmm.formats.original_layout import original_names
from dmm.models.teachers import ModelSource, open_pipeline

SOURCE = Path(dmm.__file__).parent
NAMES = re.compile(
    r"\bSD ?\d|StableDiffusion\w|\bSDXL\b|\bsd\d\b|\bsd_(v|xl)|stable-diffusion-(v|xl)|\bFLUX\b", re.IGNORECASE
)


def test_a_narrow_model_is_sd1_by_its_names():
    pipeline = tiny_pipeline()
    names = [name for part in original_names(pipeline.components, SD1).values() for name in part.values()]
    assert family_of_names(names)[0] is SD1
    assert family_of(pipeline) is SD1


def test_files_are_told_apart_by_their_names():
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    for name, title in {
        "conditioner.embedders.1.model.ln_final.weight": "SDXL",
        "conditioner.embedders.0.model.ln_final.weight": "the SDXL refiner",
        "model.diffusion_model.label_emb.0.0.weight": "SDXL",
        "cond_stage_model.model.ln_final.weight": "SD 2.x",
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "SD 3",
        "double_blocks.0.img_attn.qkv.weight": "FLUX.1",
        "control_model.input_blocks.0.0.weight": "a ControlNet",
    }.items():
        family, told_by = family_of_names([unet, name])
        assert (family.title, told_by) == (title, name)
    assert family_of_names(["something.else"]) is None


def test_sd2_folders_have_the_class_of_sd1_but_linear_projections():
    linear = {"unet": {"use_linear_projection": True}}
    assert family_of_class("StableDiffusionPipeline", {}) is SD1
    assert family_of_class("StableDiffusionPipeline", linear) is SD2
    assert family_of_class("StableDiffusionUpscalePipeline", {}).title == "StableDiffusionUpscalePipeline"


def test_sdxl_folders_are_told_from_refiners():
    texts = {"unet": {"use_linear_projection": True, "addition_embed_type": "text_time"}, "text_encoder_2": {}}
    assert family_of_class("StableDiffusionXLPipeline", texts | {"text_encoder": {}}) is SDXL
    assert family_of_class("StableDiffusionXLImg2ImgPipeline", texts | {"text_encoder": {}}) is SDXL
    assert family_of_class("StableDiffusionXLImg2ImgPipeline", texts).title == "the SDXL refiner"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_goes_by_its_key(family):
    assert FAMILIES[family.name] is family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stock_folder_opens_as_its_family_bit_for_bit(name, tmp_path):
    pipeline = TINY[name](seed=1)
    assert family_of(pipeline) is FAMILIES[name]
    assert FAMILIES[name].width(denoiser_of(pipeline)) == 32  # the port is there
    pipeline.save_pretrained(tmp_path / "model")
    assert family_of_folder(tmp_path / "model") is FAMILIES[name]
    opened = open_pipeline(ModelSource(tmp_path / "model"))
    assert type(opened) is type(pipeline)
    for component in components_of(pipeline):
        weights = getattr(opened, component.name).state_dict()
        assert all(weights[key].equal(tensor) for key, tensor in getattr(pipeline, component.name).state_dict().items())


def test_the_refiner_is_refused_by_name(tmp_path):
    sdxl = tiny_sdxl()
    texts = {name: sdxl.components[name] for name in ("text_encoder_2", "tokenizer_2", "unet", "vae", "scheduler")}
    refiner = StableDiffusionXLImg2ImgPipeline(text_encoder=None, tokenizer=None, **texts)
    refiner.save_pretrained(tmp_path / "refiner")
    with pytest.raises(UserError, match=r"is the SDXL refiner .*; SD 1\.x, SD 2\.x, .* was expected"):
        open_pipeline(ModelSource(tmp_path / "refiner"))
    with pytest.raises(UserError, match="cannot be used"):
        family_of(refiner)


def test_nothing_outside_of_families_names_one():
    named = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        if path.parent.name != "families"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if NAMES.search(line)
    ]
    assert not named
