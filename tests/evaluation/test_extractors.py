"""Extractors by name: what they find, and what they say where they cannot."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from dmm.errors import UserError
from dmm.evaluation.extractor_names import NUM_FEATURES
from dmm.evaluation.extractors import EXTRACTORS, open_extractor

CPU = torch.device("cpu")
CROP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=12))
    model.save_pretrained(tmp_path)
    CLIPImageProcessorPil(**CROP).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def dino(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    BitImageProcessorPil(**CROP).save_pretrained(tmp_path)
    return tmp_path


def as_pil(images):
    return [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images]


def test_clip_is_its_image_embedding(clip, images):
    found = open_extractor(f"clip={clip}", CPU)(images)["features"]
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(as_pil(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(clip)(pixels).image_embeds
    torch.testing.assert_close(found, expected)


def test_dino_is_its_class_token(dino, images):
    found = open_extractor(f"dino={dino}", CPU)(images)["features"]
    pixels = BitImageProcessorPil.from_pretrained(dino)(as_pil(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino)(pixels).pooler_output
    torch.testing.assert_close(found, expected)


def test_what_is_known_before_one_is_open_is_so(images):
    assert list(NUM_FEATURES) == list(EXTRACTORS)
    assert NUM_FEATURES["judge"] == open_extractor("judge", CPU)(images)["features"].shape[1]


def test_the_judge_tells_features_style_and_concept(images):
    judge = open_extractor("judge", CPU)
    found = judge(images)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "features": (3, 320),
        "style": (3, len(judge.styles)),
        "concept": (3, len(judge.concepts)),
    }
    with pytest.raises(UserError, match="32 x 32 pixels, these are 48 x 16"):
        judge(torch.zeros(1, 3, 16, 48, dtype=torch.uint8))


def test_what_cannot_be_opened_is_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no extractor 'klip'; did you mean 'clip'"):
        open_extractor("klip", CPU)
    with pytest.raises(UserError, match=r"'dino' could not be opened from .*--extractor dino=FOLDER"):
        open_extractor(f"dino={tmp_path}", CPU)
    with pytest.raises(UserError, match="not a judge's folder"):
        open_extractor("judge=weights", CPU)
    with pytest.raises(UserError, match=r"torch-fidelity|no such file"):
        open_extractor(f"inception={tmp_path / 'weights.pth'}", CPU)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity")
def test_inceptions_weights_are_named_where_they_are_missing_or_no_weights(tmp_path):
    with pytest.raises(UserError, match=r"no such file. It is to be a copy of https.*weights-inception"):
        open_extractor(f"inception={tmp_path / 'weights.pth'}", CPU)
    (tmp_path / "weights.pth").write_text("no weights")
    with pytest.raises(UserError, match="could not be read"):
        open_extractor(f"inception={tmp_path / 'weights.pth'}", CPU)
