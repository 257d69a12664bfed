"""The judge takes pictures of its size, and knows what the experts paint."""

import pytest
import torch
from PIL import Image

from dmm.demo import expert_sources
from dmm.demo.judge import judge_images, load_judge
from dmm.models.teachers import open_pipeline
from dmm.pipeline.sampling import sample


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def test_features_are_the_heads_input(judge):
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        verdict = judge(images)
        torch.testing.assert_close(judge.style_head(verdict.features), verdict.style_logits)
        torch.testing.assert_close(judge.concept_head(verdict.features), verdict.concept_logits)
    assert verdict.features.shape == (3, sum(judge.config.channels))


def test_the_verdict_does_not_depend_on_the_batch(judge):
    pictures = [Image.effect_noise((32, 32), 60).convert("RGB") for _ in range(5)]
    whole, cut = judge_images(judge, pictures), judge_images(judge, pictures, batch_size=2)
    torch.testing.assert_close(whole.features, cut.features)


def test_pictures_of_another_size_are_refused(judge):
    with pytest.raises(ValueError, match="32, 32"):
        judge(torch.zeros(1, 3, 64, 64))


def test_it_knows_an_experts_hand_and_things(judge):
    things = list(judge.config.concepts)[:16]
    pictures = list(sample(open_pipeline(expert_sources()["fluent-contrast"]), things, range(16), guidance_scale=2.0))
    verdict = judge_images(judge, pictures)
    styles = [judge.config.styles[i] for i in verdict.style_logits.argmax(1).tolist()]
    assert styles.count("fluent-contrast") >= 14
    assert (verdict.concept_logits.argmax(1) == torch.arange(16)).sum() >= 10
