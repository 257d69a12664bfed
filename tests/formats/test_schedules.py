"""A model's noise schedule survives the format: what a single file says is what its folder said."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from helpers import copy_folder, rewrite
from safetensors import safe_open

from dmm.errors import UserError
from dmm.formats.configs import CONFIGS_KEY
from dmm.formats.original_layout import V_PREDICTION_MARK, ZERO_SNR_MARK
from dmm.formats.schedules import (
    STOCK,
    check_same_schedule,
    marks,
    noise_schedule,
    untold_by_marks,
    with_schedule,
)
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, check_model, open_pipeline
from dmm.pipeline.sampling import sample

ZERO = {**STOCK, "rescale_betas_zero_snr": True}
OTHER = {**STOCK, "beta_end": 0.02}
LISTED = {"trained_betas": np.linspace(0.001, 0.02, 500).tolist(), "num_train_timesteps": 500}


def with_scheduler(scheduler):
    pipe = tiny_pipeline()
    pipe.register_modules(scheduler=scheduler)
    return pipe


def header_of(path):
    with safe_open(path, "pt") as file:
        return set(file.keys()), file.metadata()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (STOCK, set()),
        ({**STOCK, "prediction_type": "v_prediction"}, {V_PREDICTION_MARK}),
        (ZERO, {ZERO_SNR_MARK}),
        ({**ZERO, "prediction_type": "v_prediction"}, {V_PREDICTION_MARK, ZERO_SNR_MARK}),
        (OTHER, set()),
    ],
    ids=["epsilon", "v", "zero SNR", "v with zero SNR", "other betas"],
)
def test_the_marks_that_loaders_look_for(config, expected):
    found = marks(config)
    assert found.keys() == expected
    assert all(mark.numel() == 0 for mark in found.values())


def test_what_no_mark_says_is_a_sentence():
    assert untold_by_marks(STOCK) is None
    assert untold_by_marks(ZERO) is None
    assert untold_by_marks(EulerDiscreteScheduler.from_config(ZERO).config) is None
    for config in (OTHER, {**OTHER, "rescale_betas_zero_snr": True}, LISTED, {**STOCK, "beta_schedule": "linear"}):
        assert "its noise schedule is not the usual one" in untold_by_marks(config)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler.from_config(STOCK, skip_prk_steps=True, steps_offset=1),
        DDIMScheduler.from_config(ZERO, prediction_type="v_prediction", clip_sample=False),
        EulerDiscreteScheduler.from_config(ZERO, prediction_type="v_prediction", timestep_spacing="trailing"),
        DDIMScheduler.from_config(OTHER),
        DDIMScheduler.from_config(LISTED),
    ],
    ids=["stock", "zero SNR", "zero SNR, trailing", "other betas", "listed betas"],
)
def test_a_picture_from_the_file_is_the_picture_from_the_folder(scheduler, sd1_folder, tmp_path):
    pipe = with_scheduler(scheduler)
    pipe.save_pretrained(tmp_path / "folder")
    save_single_file(pipe, tmp_path / "model.safetensors")
    file = open_pipeline(ModelSource(tmp_path / "model.safetensors", config=sd1_folder))  # a config of another schedule
    assert noise_schedule(file.scheduler.config).equal(noise_schedule(scheduler.config))
    folder = open_pipeline(ModelSource(tmp_path / "folder"))
    one, other = (
        np.asarray(next(sample(each, ["a cat"], [3], steps=3, guidance_scale=2)), dtype=int) for each in (file, folder)
    )
    assert (one == other).all()


def test_a_file_with_nothing_but_the_mark_ends_in_noise(sd1_folder, sd1_file, tmp_path):
    file = rewrite(
        sd1_file,
        tmp_path / "noob.safetensors",
        lambda tensors: tensors.update({V_PREDICTION_MARK: torch.zeros(0), ZERO_SNR_MARK: torch.zeros(0)}),
        metadata={},
    )
    pipe = open_pipeline(ModelSource(file, config=sd1_folder))
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.rescale_betas_zero_snr
    assert pipe.scheduler.alphas_cumprod[-1] == 0  # the config's PNDM knows no such schedule
    assert pipe.scheduler.config.timestep_spacing == "trailing"


def test_a_file_that_says_nothing_follows_the_config(sd1_file, sd1_folder, tmp_path):
    silent = rewrite(sd1_file, tmp_path / "x.safetensors", lambda _: None, metadata={})
    with_scheduler(DDIMScheduler.from_config(OTHER)).save_pretrained(tmp_path / "folder")
    for config in (sd1_folder, tmp_path / "folder"):
        told = check_model(ModelSource(silent, config=config)).scheduler_config
        own = json.loads((config / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
        assert noise_schedule(told).equal(noise_schedule(own))


def test_what_a_file_says_replaces_all_of_the_configs_schedule():
    said = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    listed = {"_class_name": "PNDMScheduler", **LISTED}
    changed = with_schedule(listed, dict.fromkeys(("trained_betas", *STOCK)) | said)
    assert noise_schedule(changed).equal(noise_schedule(said))


@pytest.mark.parametrize("config", [{"beta_start": "x"}, {"trained_betas": [None]}, {"num_train_timesteps": 10**9}])
def test_a_schedule_that_cannot_be_read_is_refused(sd1_file, sd1_folder, tmp_path, config):
    told = json.dumps({"scheduler/scheduler_config.json": config})
    file = rewrite(sd1_file, tmp_path / "x.safetensors", lambda _: None, {CONFIGS_KEY: told})
    with pytest.raises(UserError, match="the scheduler config that it carries tells of no noise schedule"):
        check_model(ModelSource(file, config=sd1_folder))


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "DPMSolverMultistepScheduler"),
        (EDMEulerScheduler(), "EDMEulerScheduler"),
    ],
    ids=["flow", "flow sigmas", "EDM"],
)
def test_schedulers_of_another_kind_of_training_are_refused(sd1_folder, tmp_path, scheduler, name):
    folder = copy_folder(sd1_folder, tmp_path / "folder")
    scheduler.save_pretrained(folder / "scheduler")
    with pytest.raises(UserError, match=f"names a {name} for models that are trained in another way"):
        check_model(ModelSource(folder))


@pytest.mark.parametrize("changes", [{"_class_name": "Scheduler9"}, {"beta_start": "a"}, {"num_train_timesteps": 0}])
def test_schedulers_that_are_none_are_refused(sd1_folder, tmp_path, changes):
    folder = copy_folder(sd1_folder, tmp_path / "folder")
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    told = r"(: its beta_start is 'a'| names the scheduler 'Scheduler9'| tells of no noise)"
    with pytest.raises(UserError, match=rf"scheduler_config\.json{told}"):
        check_model(ModelSource(folder))


@pytest.mark.parametrize("skip", [True, False])
def test_schedulers_that_need_several_steps_are_taken(sd1_folder, tmp_path, skip):
    folder = copy_folder(sd1_folder, tmp_path / "folder")
    PNDMScheduler.from_config(STOCK, skip_prk_steps=skip).save_pretrained(folder / "scheduler")
    assert check_model(ModelSource(folder)).scheduler_config["skip_prk_steps"] is skip


def test_a_scheduler_for_few_steps_is_taken_whose_path_has_fewer_points_than_are_usual(sd1_folder, tmp_path):
    folder = copy_folder(sd1_folder, tmp_path / "folder")
    LCMScheduler.from_config(STOCK, original_inference_steps=10).save_pretrained(folder / "scheduler")
    assert check_model(ModelSource(folder)).scheduler_config["original_inference_steps"] == 10


def test_other_schedules_are_told_with_the_values_where_they_differ_most():
    stock, zero, listed = (noise_schedule(config) for config in (STOCK, ZERO, LISTED))
    check_same_schedule("teacher 'a'", stock, "the student's", stock.clone())
    with pytest.raises(UserError, match=r"teacher 'a': its noise schedule is not the student's: alphas_cumprod at"):
        check_same_schedule("teacher 'a'", zero, "the student's", stock)
    with pytest.raises(UserError, match=r"has 500 steps, the student's 1000"):
        check_same_schedule("teacher 'a'", listed, "the student's", stock)


def test_a_file_of_each_says_it_in_its_header(tmp_path):
    save_single_file(with_scheduler(DDIMScheduler.from_config(ZERO)), tmp_path / "x.safetensors")
    names, metadata = header_of(tmp_path / "x.safetensors")
    assert ZERO_SNR_MARK in names
    assert json.loads(metadata[CONFIGS_KEY])["scheduler/scheduler_config.json"]["rescale_betas_zero_snr"] is True
    save_single_file(tiny_pipeline(), tmp_path / "y.safetensors", dtype=torch.float16)
    assert not header_of(tmp_path / "y.safetensors")[0] & {ZERO_SNR_MARK, V_PREDICTION_MARK}
