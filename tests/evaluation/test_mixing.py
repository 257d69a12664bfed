"""Mixes: weighted merging, and scores of the student's beside it, by real CLIPs at tiny size."""

import pytest
import torch
from conftest import MAX_TOKENS, tiny_tokenizer
from evaluation_helpers import PAINTING, PROMPTS, STUDENT, TEACHERS, evaluate_in
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from dmm.errors import UserError
from dmm.evaluation.evaluate import Protocol
from dmm.evaluation.mixing import weighted_merge
from dmm.evaluation.preference import open_scorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def cosines(clip, images):
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    given = processor(text=list(PROMPTS), images=list(images), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits_per_image
    return (logits / model.logit_scale.exp()).diagonal(), model.logit_scale.exp()


def test_clip_score_is_a_hundred_times_the_cosine(clip, images):
    found = open_scorer(f"clip={clip}", CPU)(images, PROMPTS)
    torch.testing.assert_close(found, (100 * cosines(clip, images)[0]).clamp(min=0).detach())
    assert (found > 0).any()


def test_pickscore_is_the_scaled_cosine_of_its_towers(clip, images):
    found = open_scorer(f"pickscore={clip}", CPU)(images, PROMPTS)
    values, scale = cosines(clip, images)
    torch.testing.assert_close(found, (scale * values).detach())


@pytest.mark.parametrize(("labels", "expected"), [(["aesthetic", "not"], "probability"), (["LABEL_0"], "output")])
def test_aesthetic_score(tmp_path, images, labels, expected):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, id2label=dict(enumerate(labels)))
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    found = open_scorer(f"aesthetic={tmp_path}", CPU)(images, PROMPTS)
    pixels = ViTImageProcessorPil.from_pretrained(tmp_path)(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = ViTForImageClassification.from_pretrained(tmp_path)(pixels).logits
    torch.testing.assert_close(found, logits.softmax(1)[:, 0] if expected == "probability" else logits[:, 0])


def test_a_score_that_is_not_there_names_what_it_needs(tmp_path):
    with pytest.raises(UserError, match=r"needs image-reward from PyPI.*entry point 'imagereward' of the group"):
        open_scorer("imagereward", CPU)
    with pytest.raises(UserError, match="no score 'pikscore'; did you mean 'pickscore'"):
        open_scorer("pikscore", CPU)
    with pytest.raises(UserError, match=r"'pickscore' could not be opened from .*--score pickscore=FOLDER"):
        open_scorer(f"pickscore={tmp_path}", CPU)


def test_weighted_merging_is_the_weighted_mean():
    one, other = (TEACHERS[style].open(torch.float32) for style in ("ink", "photo"))
    merged = weighted_merge(TEACHERS, {"ink": 0.25, "photo": 0.75}, torch.float32)
    for name in ("unet", "text_encoder", "vae"):
        tensors, ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (merged, one, other))
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, 0.25 * ours[key] + 0.75 * theirs[key])


def test_a_mix_is_scored_beside_weighted_merging(clip, tmp_path):
    scorer = open_scorer(f"pickscore={clip}", CPU)
    protocol = Protocol(PROMPTS, 100, PAINTING)
    mixes = [{"ink": 1.0}, {"ink": 0.5, "photo": 0.5}]
    found = evaluate_in(tmp_path, STUDENT, protocol=protocol, mixes=mixes, scorers=[scorer]).figures["mixing"]
    assert list(found) == ["ink=1", "ink=0.5,photo=0.5"]
    alone, mixed = (one["pickscore"] for one in found.values())
    # of one teacher alone, the perfect merge's style is the weighted merge
    assert abs(alone["difference"]["value"]) < 0.01 * abs(alone["student"]["value"])
    assert mixed["difference"]["value"] == pytest.approx(
        mixed["student"]["value"] - mixed["weighted_merge"]["value"], abs=1e-5
    )
    assert mixed["difference"]["value"] != 0
