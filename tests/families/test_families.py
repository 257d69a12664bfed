import re
from pathlib import Path

import pytest
from conftest import tiny_pipeline

import dmm
from dmm.families import FAMILIES, family_of, family_of_class, family_of_names
from dmm.families.sd1 import SD1
from dmm.formats.single_file import original_names

SOURCE = Path(dmm.__file__).parent
NAMES = re.compile(
    r"\bSD ?\d|StableDiffusion\w|\bSDXL\b|\bsd\d\b|\bsd_(v|xl)|stable-diffusion-(v|xl)|\bFLUX\b", re.IGNORECASE
)


def test_a_narrow_model_is_sd1_by_its_names():
    pipeline = tiny_pipeline()
    names = [name for part in original_names(pipeline.components, SD1).values() for name in part.values()]
    assert family_of_names(names)[0] is SD1
    assert family_of(pipeline) is SD1


def test_the_others_are_told_apart_by_their_names():
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    for name, title in {
        "conditioner.embedders.1.model.ln_final.weight": "SDXL",
        "model.diffusion_model.label_emb.0.0.weight": "SDXL",
        "cond_stage_model.model.ln_final.weight": "SD 2.x",
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "SD 3",
        "double_blocks.0.img_attn.qkv.weight": "FLUX",
        "control_model.input_blocks.0.0.weight": "a ControlNet",
    }.items():
        family, told_by = family_of_names([unet, name])
        assert (family.title, told_by) == (title, name)
    assert family_of_names(["something.else"]) is None


def test_sd2_folders_have_the_class_of_sd1_but_linear_projections():
    linear = {"unet": {"use_linear_projection": True}}
    assert family_of_class("StableDiffusionPipeline", {}) is SD1
    assert family_of_class("StableDiffusionPipeline", linear).title == "SD 2.x"
    assert family_of_class("StableDiffusionXLPipeline", linear).title == "SDXL"
    assert family_of_class("StableDiffusionUpscalePipeline", {}).title == "StableDiffusionUpscalePipeline"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_goes_by_its_key(family):
    assert FAMILIES[family.name] is family


def test_the_port_is_there():
    assert SD1.width(tiny_pipeline().unet) == 32


def test_nothing_outside_of_families_names_one():
    named = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        if path.parent.name != "families"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if NAMES.search(line)
    ]
    assert not named
