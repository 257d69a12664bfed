"""Treated hands, and the LoRAs of many of them that are trained at once."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dmm.demo import experts
from dmm.models.teachers import ModelSource, open_pipeline

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))
from drawings import STYLES
from train_treated import put_under, save_loras
from treatments import ALL_STYLES, TREATMENTS, treat


def test_there_are_thirty_two_hands_and_each_name_is_one():
    assert len(set(ALL_STYLES)) == len(ALL_STYLES) == len(STYLES) * (1 + len(TREATMENTS)) == 32


def test_each_picture_is_treated_as_its_style_says():
    images = torch.rand((4, 3, 5, 5), generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = ["noto", "twemoji-inverted", "fluent-sepia", "noto-blueprint"]
    treated = treat(images, torch.tensor([ALL_STYLES.index(style) for style in asked]))
    torch.testing.assert_close(treated[0], images[0], rtol=0, atol=0)
    torch.testing.assert_close(treated[1], -images[1], rtol=0, atol=0)
    torch.testing.assert_close(treated[2:3], TREATMENTS["sepia"](images[2:3]))
    torch.testing.assert_close(treated[3:], TREATMENTS["blueprint"](images[3:]))


@pytest.mark.parametrize("name", TREATMENTS)
def test_a_treatment_tells_black_from_white_and_stays_in_range(name):
    black, white = (TREATMENTS[name](torch.full((1, 3, 1, 1), value)) for value in (-1.0, 1.0))
    assert (black - white).abs().min() > 0.5
    assert max(black.abs().max(), white.abs().max()) <= 1


def test_a_lora_of_many_is_the_lora_that_is_written(tmp_path):
    base = experts()["base"]
    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    untouched = deepcopy(pipeline.unet)
    loras = put_under(pipeline.unet, count=2, rank=2)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn((4, 12, 8, 8), generator=generator)
    states = torch.randn((4, pipeline.tokenizer.model_max_length, 128), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(noisy, 500, states).sample, untouched(noisy, 500, states).sample)
        for lora in loras.values():
            lora.up.normal_(std=0.3, generator=generator)
        together = pipeline.unet(noisy, 500, states).sample
    save_loras(tmp_path, ["one", "other"], loras, rank=2)
    for place, name in enumerate(("one", "other")):
        rows = slice(2 * place, 2 * place + 2)
        alone = open_pipeline(ModelSource(base, loras=((tmp_path / f"{name}.safetensors", 1.0),))).unet
        with torch.no_grad():
            found = alone(noisy[rows], 500, states[rows]).sample
            assert (found - untouched(noisy[rows], 500, states[rows]).sample).abs().mean() > 0.1
        torch.testing.assert_close(found, together[rows], rtol=0.02, atol=0.02)  # written in half precision
