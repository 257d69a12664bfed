"""The embedded experts open in every form, with our code and with plain diffusers."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from dmm.demo import expert_sources, experts
from dmm.demo.assembly import COLLECTIONS, PLAN, RECORD, WEIGHTS
from dmm.demo.judge import judge_images, load_judge
from dmm.errors import UserError
from dmm.files.digest import sha256
from dmm.formats.lora import read_lora
from dmm.models.teachers import open_pipeline
from dmm.pipeline.sampling import sample

NAMES = (
    *("base", "noto", "noto-blob", "twemoji", "openmoji", "openmoji-black", "fluent", "fluent-flat"),
    *("fluent-contrast", "noto-v"),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def paths(cache):
    return experts(cache=cache)


def test_all_are_there_in_the_forms_that_collections_have(paths):
    assert tuple(paths) == NAMES
    assert all(path.exists() for path in paths.values())
    assert [name for name, path in paths.items() if path.is_file()] == [
        *("twemoji", "openmoji", "openmoji-black", "fluent-flat", "fluent-contrast")
    ]


def test_what_is_stored_fits():
    def size(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(WEIGHTS / "sdxl") < 14e6
    assert size(WEIGHTS / "sd3") < 10e6
    assert size(WEIGHTS / "sd1" / "controls") < 3e6
    others = size(WEIGHTS / "sdxl") + size(WEIGHTS / "sd3") + size(WEIGHTS / "sd1" / "controls")
    assert size(WEIGHTS) - others < 40e6


def test_a_family_without_experts_is_told(cache):
    with pytest.raises(UserError, match="no embedded experts of 'sd9'; there are of sd1, sd3, sdxl"):
        experts("sd9", cache=cache)


@pytest.mark.parametrize(("name", "hand"), [("noto", "noto"), ("openmoji", "openmoji"), ("fluent-v", "fluent")])
def test_the_small_sdxl_paints_in_its_hands_with_plain_diffusers(cache, name, hand):
    paths = experts("sdxl", cache=cache)
    assert list(paths) == ["base", "noto", "openmoji", "fluent-v"]
    is_lora = paths[name].is_file()
    pipe = StableDiffusionXLPipeline.from_pretrained(paths["base" if is_lora else name])
    if is_lora:
        pipe.load_lora_weights(paths[name])
    pipe.set_progress_bar_config(disable=True)
    told = pipe.scheduler.config
    assert (told.prediction_type == "v_prediction") == bool(told.rescale_betas_zero_snr) == (name == "fluent-v")
    things = ["fox", "red apple", "rocket", "castle", "sun", "house", "fish", "panda"]
    generators = [torch.Generator().manual_seed(i) for i in range(len(things))]
    pictures = pipe(things, num_inference_steps=20, guidance_scale=2.0, generator=generators).images
    judge = load_judge()
    verdict = judge_images(judge, pictures)
    right = [judge.config.styles[i] == hand for i in verdict.style_logits.argmax(1).tolist()]
    assert sum(right) >= 6


@pytest.mark.parametrize("hand", ["noto", "openmoji", "fluent-contrast"])
def test_the_small_sd3_paints_in_its_hands_with_plain_diffusers(cache, hand):
    paths = experts("sd3", cache=cache)
    assert list(paths) == ["base", "noto", "openmoji", "fluent-contrast"]
    pipe = StableDiffusion3Pipeline.from_pretrained(paths["base"], text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(paths[hand])
    pipe.set_progress_bar_config(disable=True)
    things = ["fox", "red apple", "rocket", "castle"]
    generators = [torch.Generator().manual_seed(i) for i in range(len(things))]
    pictures = pipe(things, num_inference_steps=14, guidance_scale=2.0, generator=generators).images
    judge = load_judge()
    verdict = judge_images(judge, pictures)
    right = [judge.config.styles[i] == hand for i in verdict.style_logits.argmax(1).tolist()]
    known = [
        judge.config.concepts[i] == thing for i, thing in zip(verdict.concept_logits.argmax(1), things, strict=True)
    ]
    assert sum(right) >= 2
    assert sum(known) >= 3


def paint(pipeline):
    return next(sample(pipeline, ["red apple"], [0], steps=4))


def plain(paths, name):
    """The expert as plain diffusers opens it, with no word of a dtype."""
    if name == "twemoji":
        return StableDiffusionPipeline.from_single_file(paths[name], config=str(paths["base"]))
    is_lora = paths[name].is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(paths["base" if is_lora else name])
    if is_lora:
        pipeline.load_lora_weights(paths[name])
    return pipeline


@pytest.mark.parametrize("name", NAMES)
def test_plain_diffusers_paints_what_ours_paints(cache, paths, name):
    ours, theirs = paint(open_pipeline(expert_sources(cache=cache)[name])), paint(plain(paths, name))
    difference = torch.tensor(list(ours.tobytes())).int() - torch.tensor(list(theirs.tobytes())).int()
    assert difference.abs().max() <= 2
    assert len(set(ours.tobytes())) > 20


def test_only_the_twin_predicts_velocity(cache):
    types = {
        name: open_pipeline(source).scheduler.config.prediction_type
        for name, source in expert_sources(cache=cache).items()
    }
    assert [name for name, prediction_type in types.items() if prediction_type != "epsilon"] == ["noto-v"]


def test_every_key_of_every_lora_is_the_models(cache, paths):
    base = open_pipeline(expert_sources(cache=cache)["base"])
    for name in ("openmoji", "openmoji-black", "fluent-flat", "fluent-contrast"):
        with safe_open(paths[name], "pt") as file:
            keys = list(file.keys())
        assert all(key.startswith("lora_unet_") for key in keys)
        layers = read_lora(paths[name], {"unet": base.unet, "text_encoder": base.text_encoder})
        assert 3 * len(layers) == len(keys)


def test_one_expert_has_a_text_encoder_of_its_own(paths):
    digests = {
        name: sha256(paths[name] / "text_encoder" / "model.safetensors") for name in ("base", "noto", "noto-blob")
    }
    assert digests["noto"] == digests["base"] != digests["noto-blob"]


def test_text_encoders_are_stored_under_the_names_of_all_published_ones(paths):
    with safe_open(paths["noto"] / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    with safe_open(paths["twemoji"], "pt") as file:
        assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in file.keys()  # noqa: SIM118


def test_a_damaged_expert_is_mended_and_a_whole_one_left_alone(tmp_path):
    paths = experts(cache=tmp_path)
    record = paths["base"].parent / RECORD
    before = record.stat().st_mtime_ns
    experts(cache=tmp_path)
    assert record.stat().st_mtime_ns == before
    with paths["twemoji"].open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    digest = json.loads(record.read_text())["twemoji.safetensors"]
    assert sha256(paths["twemoji"]) != digest
    assert sha256(experts(cache=tmp_path)["twemoji"]) == digest
    assert [path.name for path in tmp_path.iterdir()] == [paths["base"].parent.name]


def test_assembling_is_quiet_and_leaves_the_libraries_as_they_were(tmp_path, capsys):
    from diffusers.utils import logging

    logging.enable_progress_bar()
    before = logging.get_verbosity()
    experts(cache=tmp_path)
    assert capsys.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, True)


def test_a_damaged_package_is_told(tmp_path, monkeypatch):
    from dmm.demo import assembly

    plan = json.loads((WEIGHTS / COLLECTIONS[0] / PLAN).read_text())
    plan["files"]["../vae.safetensors"] = "0" * 64
    monkeypatch.setattr(assembly, "_plan", lambda _family: plan)
    with pytest.raises(UserError, match=r"vae\.safetensors' is damaged"):
        experts(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        experts(cache=tmp_path / "file" / "cache")
