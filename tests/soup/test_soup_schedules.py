"""A soup predicts what its models predict, of the noise that they were trained on, in whatever layout it is written."""

import re

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DDIMScheduler, PNDMScheduler
from helpers import rewrite
from safetensors.torch import load_file
from soup_models import digests, own_cache  # noqa: F401 - fixtures

from dmm.errors import UserError
from dmm.formats.original_layout import V_PREDICTION_MARK, ZERO_SNR_MARK
from dmm.formats.schedules import STOCK, noise_schedule
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.soup.make import make_soup
from dmm.soup.recipe import SoupRecipe

SCHEDULERS = {
    "stock": PNDMScheduler.from_config(STOCK),
    "v": PNDMScheduler.from_config(STOCK, prediction_type="v_prediction"),
    "zero": DDIMScheduler.from_config(
        STOCK, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "betas": DDIMScheduler.from_config({**STOCK, "beta_end": 0.02}),
}
MARKS = {"stock": set(), "v": {V_PREDICTION_MARK}, "zero": {V_PREDICTION_MARK, ZERO_SNR_MARK}, "betas": set()}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Of each scheduler a folder, a single file of ours, and one with nothing but its marks; read only."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, scheduler in SCHEDULERS.items():
        pipe = tiny_pipeline()
        pipe.register_modules(scheduler=scheduler)
        pipe.save_pretrained(folder / name)
        save_single_file(pipe, folder / f"{name}.safetensors")
        rewrite(folder / f"{name}.safetensors", folder / f"{name}-bare.safetensors", lambda _: None, metadata={})
    return folder


def soup_of(shelf, output, *names, **more):
    teachers = [{"name": f"t{i}", "model": str(shelf / name)} for i, name in enumerate(names)]
    return make_soup(SoupRecipe(method="soup", teachers=teachers, **more), output)


def open_soup(made, config):
    return open_pipeline(ModelSource(made.path, config=config if made.path.is_file() else None))


@pytest.mark.parametrize("output", ["soup", "soup.safetensors"])
@pytest.mark.parametrize("suffix", ["", ".safetensors"], ids=["of folders", "of files"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_kept_in_every_layout(shelf, tmp_path, name, suffix, output):
    made = soup_of(shelf, tmp_path / output, name + suffix, name + suffix)
    scheduler = open_soup(made, shelf / "stock").scheduler
    assert scheduler.config.prediction_type == SCHEDULERS[name].config.prediction_type
    assert noise_schedule(scheduler.config).equal(noise_schedule(SCHEDULERS[name].config))
    assert scheduler.config.timestep_spacing == SCHEDULERS[name].config.timestep_spacing
    if made.path.is_file():
        assert load_file(made.path).keys() & {V_PREDICTION_MARK, ZERO_SNR_MARK} == MARKS[name]
    told = [note for note in made.notes if "noise schedule is not the usual one" in note]
    assert len(told) == (name == "betas" and made.path.is_file())


@pytest.mark.parametrize("name", ["stock", "v", "zero"])
def test_marks_alone_go_through_files_and_into_folders(shelf, tmp_path, name):
    file = soup_of(shelf, tmp_path / "soup.safetensors", f"{name}-bare.safetensors", f"{name}-bare.safetensors")
    assert load_file(file.path).keys() & {V_PREDICTION_MARK, ZERO_SNR_MARK} == MARKS[name]
    bare = f"{name}-bare.safetensors"
    folder = soup_of(shelf, tmp_path / "soup", bare, bare, config=str(shelf / "stock"))
    for made in (file, folder):
        scheduler = open_soup(made, shelf / "stock").scheduler
        assert scheduler.config.prediction_type == SCHEDULERS[name].config.prediction_type
        assert noise_schedule(scheduler.config).equal(noise_schedule(SCHEDULERS[name].config))


def test_the_mark_stands_once_and_with_all_tensors(shelf, tmp_path):
    made = soup_of(shelf, tmp_path / "s.safetensors", "zero", "zero-bare.safetensors", precision="fp16")
    assert load_file(made.path).keys() == load_file(shelf / "zero.safetensors").keys()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("v", "zero"), "at step 506 is 0.233057, that of teacher 't0' 0.268381"),
        (
            ("v-bare.safetensors", "zero-bare.safetensors"),
            "at step 506 is 0.233057, that of teacher 't0' 0.268381",
        ),
        (("zero.safetensors", "v"), "at step 506 is 0.268381, that of teacher 't0' 0.233057"),
        (("betas", "stock.safetensors"), "its noise schedule is not that of teacher 't0'"),
        (("stock-bare.safetensors", "betas.safetensors"), "its noise schedule is not that of teacher 't0'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("output", ["soup", "soup.safetensors"])
def test_models_of_different_schedules_are_refused(shelf, tmp_path, names, message, output):
    with pytest.raises(UserError, match=rf"teacher 't1': .*: .*{re.escape(message)}"):
        soup_of(shelf, tmp_path / output, *names)
    assert not list(tmp_path.glob("soup*"))


def test_the_base_is_one_of_the_models(shelf, tmp_path):
    with pytest.raises(UserError, match="not that of base"):
        soup_of(shelf, tmp_path / "s.safetensors", "betas", base=str(shelf / "stock"))


def test_a_wordless_file_is_taken_for_what_the_folders_beside_it_are(shelf, tmp_path):
    made = soup_of(shelf, tmp_path / "soup", "betas", "betas-bare.safetensors")
    assert noise_schedule(open_soup(made, None).scheduler.config).equal(noise_schedule(SCHEDULERS["betas"].config))


def test_a_flow_scheduler_in_a_folder_is_refused(shelf, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow/scheduler")
    with pytest.raises(UserError, match=r"/flow/scheduler/.* names a FlowMatchEulerDiscreteScheduler"):
        soup_of(tmp_path, tmp_path / "s.safetensors", "flow")


@pytest.mark.parametrize("output", ["soup", "soup.safetensors"])
def test_values_too_large_for_the_output_are_refused_by_tensor_and_leave_nothing(shelf, tmp_path, output):
    name = "model.diffusion_model.input_blocks.0.0.bias"

    def enlarge(tensors):
        tensors[name][:3] = 1e6

    rewrite(shelf / "stock.safetensors", tmp_path / "big.safetensors", enlarge)
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"(input_blocks\.0\.0|conv_in)\.bias' of the soup would hold"):
        soup_of(tmp_path, tmp_path / output, "big.safetensors", precision="fp16", config=str(shelf / "stock"))
    assert {path for path in tmp_path.iterdir() if path.name != "cache"} == before
    for precision in ("fp32", "bf16"):
        soup_of(tmp_path, tmp_path / precision, "big.safetensors", precision=precision, config=str(shelf / "stock"))
    assert torch.isfinite(load_file(tmp_path / "bf16/unet/diffusion_pytorch_model.safetensors")["conv_in.bias"]).all()
