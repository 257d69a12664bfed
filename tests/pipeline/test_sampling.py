import numpy as np
import pytest
import torch
from conftest import MAX_TOKENS, tiny_pipeline
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, PNDMScheduler, TCDScheduler

from dmm.errors import UserError
from dmm.models.styles import styled_port
from dmm.pipeline.samplers import SAMPLERS
from dmm.pipeline.sampling import build_scheduler, picture_size, sample, sample_latents, unread
from dmm.pipeline.styled import set_style

PROMPTS = ["a cat", "a red house by the sea", "", "a cat", "fish"]
SEEDS = [3, 1, 4, 1, 5]


def arrays(pipeline, prompts=PROMPTS, seeds=SEEDS, *, steps=4, **settings):
    images = sample(pipeline, prompts, seeds, steps=steps, **settings)
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler a"])  # the second draws noise at every step
def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_batch(pipeline, sampler):
    together = arrays(pipeline, sampler=sampler)
    by_twos = arrays(pipeline, sampler=sampler, batch_size=2)
    backwards = arrays(pipeline, PROMPTS[::-1], SEEDS[::-1], sampler=sampler, batch_size=3)[::-1]
    assert abs(together - by_twos).max() <= 1  # rounding
    assert abs(together - backwards).max() <= 1
    assert abs(together[0] - together[3]).max() > 20  # another seed
    assert abs(together[1] - together[3]).max() > 1  # another prompt


def test_pictures_are_those_of_the_pipeline_itself(pipeline):
    ours = arrays(pipeline, ["a cat"], [7], guidance_scale=5, negative_prompt="blurry")
    pipeline.scheduler = build_scheduler(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat",
        negative_prompt="blurry",
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=4,
        guidance_scale=5,
    ).images[0]
    assert (ours[0] == np.asarray(theirs)).all()


def test_noise_is_the_same_in_half_precision(pipeline):
    full = arrays(pipeline, ["a cat"], [7], steps=1, guidance_scale=1)
    half = arrays(pipeline.to(torch.bfloat16), ["a cat"], [7], steps=1, guidance_scale=1)
    other = arrays(pipeline, ["a cat"], [8], steps=1, guidance_scale=1)
    assert abs(full - half).mean() < 0.1 * abs(full - other).mean()


def test_the_pipeline_is_left_as_it_was_even_by_half_a_run(pipeline):
    scheduler, config = pipeline.scheduler, dict(pipeline.config)
    images = sample(pipeline, PROMPTS, SEEDS, steps=2, batch_size=2)
    next(images)
    assert pipeline.scheduler is scheduler
    assert dict(pipeline.config) == config
    assert not hasattr(pipeline, "_progress_bar_config")


def test_progress_adds_up_to_the_number_of_pictures(pipeline):
    shares = []
    arrays(pipeline, progress=shares.append, batch_size=2, steps=3)
    assert len(shares) == 3 * 3
    assert sum(shares) == pytest.approx(len(PROMPTS))


def test_a_size_not_given_is_the_models_own(pipeline):
    assert picture_size(pipeline) == (16, 16)
    (image,) = sample(pipeline, ["a cat"], [0], steps=1, width=40)
    assert image.size == (40, 16)


def test_a_pictures_style_is_its_own_whatever_the_batch(styled):
    styles = ["ink", None, {"ink": 0.7, "clay": 0.3}, "photo", "ink"]
    set_style(styled, "clay")
    before = arrays(styled)
    together = arrays(styled, styles=styles)
    by_twos = arrays(styled, styles=styles, batch_size=2)
    assert abs(together - by_twos).max() <= 1
    for i, style in enumerate(styles):
        alone = arrays(styled, PROMPTS[i : i + 1], SEEDS[i : i + 1], styles=[style])
        assert abs(together[i] - alone[0]).max() <= 1
    assert abs(together[0] - arrays(styled, styles=["photo"] * 5)[0]).max() > 20
    assert (arrays(styled) == before).all()


def test_the_pipelines_own_style_is_back_whenever_a_picture_is_given_out(styled):
    set_style(styled, "clay")
    own = styled_port(styled.unet).term
    for _ in sample(styled, PROMPTS, SEEDS, styles=["ink"] * 5, steps=1, batch_size=2):
        assert styled_port(styled.unet).term is own


def test_wrong_styles_are_told_before_any_work(styled, pipeline):
    for model, styles, error, message in (
        (styled, ["ink", "inc"], UserError, "no style 'inc'"),
        (styled, ["ink"], ValueError, "2 prompts and 1 styles"),
        (pipeline, ["ink", None], UserError, "has no styles"),
    ):
        with pytest.raises(error, match=message):
            sample(model, ["a cat", "a dog"], [0, 1], styles=styles)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 45}, "width must be a multiple of 8 pixels, not 45; 40 and 48 are the nearest"),
        ({"height": 3}, "8 is the nearest"),
        ({"steps": 0}, "at least 1, not 0"),
        ({"steps": 1001}, "1000 steps; 1001"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"guidance_scale": float("nan")}, "at least 1"),
        ({"guidance_scale": 1, "negative_prompt": "blurry"}, "no effect"),
        ({"sampler": "euler b"}, "no sampler 'euler b'; choose from DPM"),
    ],
)
def test_bad_settings_are_told_before_any_work(pipeline, settings, message):
    with pytest.raises(UserError, match=message):
        sample(pipeline, ["a cat"], [0], **settings)


def test_every_prompt_needs_a_seed(pipeline):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        sample(pipeline, ["a cat", "a dog"], [0])


def test_overflow_is_an_error_and_not_a_black_picture(pipeline):
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN, computed in float32"):
        arrays(pipeline, ["a cat"], [0])


def saved_and_loaded(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_keep_the_models_schedule_and_prediction_type(sampler, tmp_path):
    own = tiny_pipeline(prediction_type="v_prediction").scheduler
    # a saved config names every setting, defaults too, so that none of them shows a choice
    for config in (own.config, saved_and_loaded(own, tmp_path).config):
        scheduler = build_scheduler(config, sampler)
        assert scheduler.config.prediction_type == "v_prediction"
        assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
        scheduler.set_timesteps(25)
        assert len(scheduler.timesteps) == 25
        if sampler != "DDIM":
            assert scheduler.timesteps[0] == 999  # full noise, whatever spacing the config was saved with


def test_the_default_is_second_order_dpm_solver_plus_plus_ending_in_no_noise():
    karras_sde = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", use_karras_sigmas=True, algorithm_type="sde-dpmsolver++", solver_order=3
    )
    scheduler = build_scheduler(karras_sde.config)
    scheduler.set_timesteps(25)
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    assert (scheduler.config.algorithm_type, scheduler.config.solver_order) == ("dpmsolver++", 2)
    assert not scheduler.config.use_karras_sigmas
    assert scheduler.sigmas[-1] == 0


def test_a_model_that_asks_for_trailing_steps_gets_them():
    config = PNDMScheduler(timestep_spacing="trailing").config
    assert build_scheduler(config).config.timestep_spacing == "trailing"


def test_ddim_does_not_clip_latents():
    assert not build_scheduler(DPMSolverMultistepScheduler().config, "DDIM").config.clip_sample


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_paints(pipeline, sampler):
    first, again = (arrays(pipeline, ["a cat"], [0], sampler=sampler) for _ in range(2))
    assert (first == again).all()
    assert first.std() > 1


@pytest.mark.parametrize(("sampler", "scheduler_class"), [("LCM", LCMScheduler), ("TCD", TCDScheduler)])
def test_samplers_of_distilled_models_paint_as_diffusers_has_them(pipeline, sampler, scheduler_class):
    ours = arrays(pipeline, ["a cat"], [3], sampler=sampler, steps=4, guidance_scale=1.5)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat",
        num_inference_steps=4,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        eta=0.3,  # LCM takes none
    ).images[0]
    assert abs(ours[0] - (theirs * 255).round()).max() <= 1


def test_more_steps_than_a_distilled_models_sampler_has_are_refused(pipeline):
    with pytest.raises(UserError, match="The sampler LCM takes at most 50 steps; 60 were asked for"):
        arrays(pipeline, ["a cat"], [0], sampler="LCM", steps=60)


def test_what_the_text_encoder_does_not_read_is_known(pipeline):
    room = MAX_TOKENS - 2
    assert unread(pipeline, "a" * room) == ""
    assert unread(pipeline, "a" * (room - 1) + " bc") == "c"


def test_latents_are_those_that_the_pictures_are_decoded_from(pipeline):
    settings = {"steps": 3, "guidance_scale": 4, "negative_prompt": "blurry", "width": 16, "height": 24}
    latents = torch.stack(list(sample_latents(pipeline, PROMPTS[:2], SEEDS[:2], sampler="Euler a", **settings)))
    assert latents.shape == (2, 4, 12, 8)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    pictures = arrays(pipeline, PROMPTS[:2], SEEDS[:2], sampler="Euler a", **settings)
    assert abs(pixels - pictures).max() <= 1  # rounding


def test_layers_of_the_text_encoder_are_left_out(pipeline):
    whole = arrays(pipeline, negative_prompt="blurry")
    skipped = arrays(pipeline, negative_prompt="blurry", clip_skip=1)
    assert abs(whole - skipped).max() > 1
    del pipeline.text_encoder.encoder.layers[-1]
    assert (arrays(pipeline, negative_prompt="blurry") == skipped).all()
