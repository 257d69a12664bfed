from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from data_helpers import count_calls

from dmm.data.encoding import encode_images
from dmm.data.rows import SHARD_ROWS
from dmm.data.synthesis import Share, Synthesis, image_seeds, share_out, synthesize
from dmm.errors import UserError
from dmm.models.styles import StylePrompts
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import add_styles, set_style

SETTINGS = {"steps": 2, "guidance_scale": 3.0}
PROMPTS = ["a cat", "a dog", "a fish", "a house", "a tree"]


@pytest.fixture
def paint(tmp_path):
    """Latents of one teacher's share, and how often its UNet ran."""

    def run(pipeline, vae=None, num_images=3, cache=tmp_path, clip_skip=None, **changes):
        synthesis = Synthesis(PROMPTS, num_images, **{**SETTINGS, **changes})
        (share,) = share_out(synthesis, 1)
        calls, shares = count_calls(pipeline.unet), []
        rows = synthesize(
            pipeline, vae or pipeline.vae, share, synthesis, 16, cache, shares.append, clip_skip=clip_skip
        )
        return SimpleNamespace(
            latents=rows.read(torch.arange(num_images))["latents"], calls=calls, progress=shares, share=share
        )

    return run


def pictures(pipeline, share, **settings):
    return list(sample(pipeline, share.prompts, share.seeds, width=16, height=16, **{**SETTINGS, **settings}))


def test_painted_latents_are_those_of_the_pictures(pipeline, paint):
    painted = paint(pipeline)
    with torch.no_grad():
        decoded = pipeline.vae.decode(painted.latents / pipeline.vae.config.scaling_factor).sample
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    expected = np.stack([np.asarray(picture, dtype=float) for picture in pictures(pipeline, painted.share)])
    assert abs(pixels - expected).max() < 2  # rounding
    assert sum(painted.progress) == pytest.approx(3)


def test_latents_of_another_vae_go_through_pixels(pipeline, paint):
    students = tiny_pipeline(seed=1).vae
    painted = paint(pipeline, students)
    expected = encode_images(students, pictures(pipeline, painted.share))
    assert painted.latents.allclose(expected, atol=1e-6, rtol=2**-11)
    assert not painted.latents.allclose(paint(pipeline).latents, atol=1e-2)


def test_cached_images_are_not_painted_again(pipeline, paint):
    first = paint(pipeline)
    second = paint(tiny_pipeline())
    assert (len(first.calls), len(second.calls)) == (2, 0)
    assert second.latents.equal(first.latents)
    assert sum(second.progress) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1},
        {"guidance_scale": 2.0},
        {"negative_prompt": "blurry"},
        {"seed": 1},
        {"sampler": "Euler"},
        {"clip_skip": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_makes_other_images(pipeline, paint, changes):
    first = paint(pipeline)
    second = paint(tiny_pipeline(), **changes)
    assert second.calls
    assert not second.latents.allclose(first.latents, atol=1e-3)


def test_every_style_of_a_merged_model_paints_its_own(pipeline, paint):
    plain = paint(pipeline)
    add_styles(pipeline, StylePrompts(["ink", "oil"], dim=32))
    answers = [plain]
    for style in ("ink", "oil"):
        set_style(pipeline, style)
        answers.append(paint(pipeline))
    assert not answers[1].latents.equal(answers[0].latents)
    assert not answers[2].latents.equal(answers[1].latents)


def test_an_interrupted_synthesis_goes_on_and_ends_the_same(pipeline, paint, tmp_path):
    num_images = SHARD_ROWS + 2
    paint(pipeline, num_images=num_images, cache=tmp_path / "whole")
    interrupted = tiny_pipeline()
    calls = count_calls(interrupted.unet)

    def stop(*_):
        if len(calls) > SETTINGS["steps"]:  # in the second shard
            raise KeyboardInterrupt

    hook = interrupted.unet.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        paint(interrupted, num_images=num_images, cache=tmp_path / "halves")
    hook.remove()
    assert len(list((tmp_path / "halves").rglob("*.safetensors"))) == 1
    rest = paint(interrupted, num_images=num_images, cache=tmp_path / "halves")
    assert rest.calls == [4, 4]  # two images, with guidance
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").rglob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "halves").rglob("*.safetensors")} == whole


def test_overflow_is_told_and_not_cached(pipeline, paint, tmp_path):
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 1e6  # no float16
    with pytest.raises(UserError, match="the latents came out as NaN or infinite"):
        paint(pipeline)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("count", "num_teachers"), [(15, 3), (7, 3), (40, 2), (3, 3)])
def test_teachers_share_evenly(count, num_teachers):
    shares = share_out(Synthesis(PROMPTS, count), num_teachers)
    sizes = [len(share.prompts) for share in shares]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert all(len(share.seeds) == size for share, size in zip(shares, sizes, strict=True))


def test_each_teacher_paints_each_prompt_before_it_repeats_one():
    for share in share_out(Synthesis(PROMPTS, 20), 2):
        assert sorted(share.prompts[:5]) == sorted(share.prompts[5:]) == sorted(PROMPTS)
    first, second = share_out(Synthesis(PROMPTS, 4), 2)
    assert len({*first.prompts, *second.prompts}) == 4


def test_no_two_images_share_a_seed():
    shares = share_out(Synthesis(PROMPTS, 1000), 3)
    seeds = [seed for share in shares for seed in share.seeds]
    assert len(set(seeds)) == 1000
    assert set(seeds).isdisjoint(image_seeds(1, 1000))
    assert image_seeds(7, 4_000_000)[:3] == image_seeds(7, 3)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seeds_go_round_at_the_end_of_their_range():
    seed = next(seed for seed in range(100_000) if image_seeds(seed, 1)[0] > 2**32 - 100_000)
    seeds = image_seeds(seed, 100_000)
    assert len(set(seeds)) == 100_000
    assert max(seeds) == 2**32 - 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "There are no prompts"),
        ({"count": 0}, "at least 1, not 0"),
        ({"steps": 0}, "at least 1, not 0"),
        ({"guidance_scale": 0.5}, "not 0.5"),
        ({"sampler": "Magic"}, "no sampler 'Magic'; choose from DPM"),
    ],
)
def test_settings_out_of_range_are_told_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        Synthesis(**{"prompts": PROMPTS, "count": 5, **settings})


def test_fewer_images_than_teachers():
    with pytest.raises(UserError, match="3 teachers cannot share 2 images"):
        share_out(Synthesis(PROMPTS, 2), 3)


def test_a_size_that_the_teacher_cannot_paint(pipeline, tmp_path):
    with pytest.raises(UserError, match="must be a multiple of 8 pixels, not 12"):
        synthesize(pipeline, pipeline.vae, Share(["a"], [0]), Synthesis(["a"], 1), 12, tmp_path, lambda _: None)
