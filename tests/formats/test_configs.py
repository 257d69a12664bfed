"""Single files that open by themselves: by what they say, as the embedded models do, or by the hub."""

import json
import shutil

import pytest
import torch
from conftest import STYLE_NAMES, tiny_pipeline
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from helpers import rewrite, same_weights
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_families import later_on_disk  # noqa: F401 - a fixture
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import dmm.formats.configs as configs
from dmm.demo.assembly import WEIGHTS
from dmm.errors import UserError
from dmm.families import SD1
from dmm.formats.configs import CONFIGS_KEY, FOLLOWS_KEY, find_configs
from dmm.formats.single_file import save_single_file
from dmm.formats.tensors import read_header
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.export import export_all, export_authors, export_style
from dmm.pipeline.styled import load_pipeline, style_names
from dmm.soup.make import make_soup
from dmm.soup.recipe import SoupRecipe

HUB_KEYS = {"sd2": "v2", "sdxl": "xl_base"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch):
    """A hub that gives what is put into the mapping, by id; everything else is not there."""
    holdings = {}

    def snapshot_download(hub_id, **_):
        if hub_id not in holdings:
            raise LocalEntryNotFoundError("there is no way to the hub.\nAnd much more.")
        return str(holdings[hub_id])

    monkeypatch.setattr(configs, "snapshot_download", snapshot_download)
    return holdings


@pytest.fixture
def wordless(tmp_path, sd1_file):
    """The tiny model as a file that says nothing of itself, as others write them."""
    return rewrite(sd1_file, tmp_path / "wordless.safetensors", lambda tensors: None, metadata={})


def same_config(ours, theirs):
    one, other = (json.loads(json.dumps({k: v for k, v in config.items() if k[0] != "_"})) for config in (ours, theirs))
    return one == other


def test_what_we_wrote_opens_by_itself(sd1_file, pipeline):
    opened = open_pipeline(ModelSource(sd1_file))
    assert same_weights(opened, pipeline)
    assert opened.tokenizer("a cat").input_ids == pipeline.tokenizer("a cat").input_ids
    assert opened.tokenizer.model_max_length == pipeline.tokenizer.model_max_length
    assert same_config(opened.scheduler.config, pipeline.scheduler.config)
    assert same_config(opened.unet.config, pipeline.unet.config)


def test_a_file_says_what_it_follows_and_nothing_of_whose_computer_it_was(tmp_path, sd1_folder):
    (tmp_path / "models").mkdir()
    shutil.copytree(sd1_folder, tmp_path / "models" / "base")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "models" / "base")
    save_single_file(pipe, tmp_path / "out.safetensors")
    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata[FOLLOWS_KEY] == "./models/base"
    assert str(tmp_path) not in json.dumps(metadata)
    # another computer has nothing of the folder
    shutil.rmtree(tmp_path / "models")
    assert same_weights(open_pipeline(ModelSource(tmp_path / "out.safetensors")), pipe)


def test_what_came_from_the_hub_is_followed_by_its_id(tmp_path, sd1_folder):
    snapshot = tmp_path / "hub" / "models--owner--sd-tiny" / "snapshots" / "0123"
    shutil.copytree(sd1_folder, snapshot)
    save_single_file(StableDiffusionPipeline.from_pretrained(snapshot), tmp_path / "out.safetensors")
    assert read_header(tmp_path / "out.safetensors").metadata[FOLLOWS_KEY] == "owner/sd-tiny"


def test_a_large_tokenizer_comes_from_the_folder_that_is_followed_or_from_the_hub(
    tmp_path, sd1_folder, monkeypatch, hub
):
    monkeypatch.setattr(configs, "_MAX_TOKENIZER", 10)
    shutil.copytree(sd1_folder, tmp_path / "base")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    file = tmp_path / "out.safetensors"
    save_single_file(pipe, file)
    assert "tokenizer/tokenizer.json" not in json.loads(read_header(file).metadata[CONFIGS_KEY])
    assert same_weights(open_pipeline(ModelSource(file)), pipe)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"tokenizer of '{SD1.hub_id}', and the hub did not give"):
        open_pipeline(ModelSource(file))
    hub[SD1.hub_id] = tmp_path / "moved"
    assert same_weights(open_pipeline(ModelSource(file)), pipe)


def test_a_wordless_file_of_the_embedded_widths_follows_the_package(tmp_path, hub):
    packaged = WEIGHTS / "sd1" / "configs"
    parts = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(packaged / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(packaged / "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(packaged / "text_encoder")),
        "tokenizer": CLIPTokenizer.from_pretrained(packaged / "tokenizer"),
        "scheduler": tiny_pipeline().scheduler,
    }
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    save_single_file(pipe, tmp_path / "told.safetensors", dtype=torch.float16)
    file = rewrite(tmp_path / "told.safetensors", tmp_path / "wordless.safetensors", lambda _: None, metadata={})
    assert find_configs(file, read_header(file), SD1) == packaged
    assert open_pipeline(ModelSource(file)).tokenizer("fox").input_ids == pipe.tokenizer("fox").input_ids


def test_a_wordless_file_follows_its_familys_first_model_on_the_hub(wordless, sd1_folder, pipeline, hub, tmp_path):
    assert SD1.hub_id == DIFFUSERS_DEFAULT_PIPELINE_PATHS["v1"]["pretrained_model_name_or_path"]
    with pytest.raises(UserError) as refused:
        open_pipeline(ModelSource(wordless))
    assert str(refused.value) == (
        f"{wordless} is a single file, which needs the configs and the tokenizer of '{SD1.hub_id}', and the hub did "
        "not give them (there is no way to the hub). Go online once, or name a pipeline folder of the same "
        "architecture as its config (config=, --config)."
    )
    assert same_weights(open_pipeline(ModelSource(wordless, config=sd1_folder)), pipeline)
    hub[SD1.hub_id] = sd1_folder
    assert same_weights(open_pipeline(ModelSource(wordless)), pipeline)
    # what an earlier command fetched of it, with no network since
    hub[SD1.hub_id] = tmp_path / "part"
    (tmp_path / "part" / "unet").mkdir(parents=True)
    with pytest.raises(UserError, match=r"there is no model_index\.json in the part of it that was fetched"):
        open_pipeline(ModelSource(wordless))


@pytest.mark.parametrize("large", [True, False], ids=["tokenizers fetched", "tokenizers carried"])
def test_files_of_every_family_open_by_themselves(later_on_disk, tmp_path, monkeypatch, hub, large):  # noqa: F811
    family, folder, file = later_on_disk
    pipe = open_pipeline(ModelSource(folder))
    if large:
        monkeypatch.setattr(configs, "_MAX_TOKENIZER", 10)
        file = tmp_path / "large.safetensors"
        save_single_file(pipe, file)
        with pytest.raises(UserError, match="and the hub did not give"):
            open_pipeline(ModelSource(rewrite(file, tmp_path / "far.safetensors", lambda _: None, _elsewhere(file))))
        hub[family.hub_id] = folder
        file = tmp_path / "far.safetensors"
    opened = open_pipeline(ModelSource(file))
    assert same_weights(opened, pipe)
    for tokenizer in family.tokenizers:
        assert getattr(opened, tokenizer)("a cat").input_ids == getattr(pipe, tokenizer)("a cat").input_ids


def _elsewhere(file):
    return {key: value for key, value in read_header(file).metadata.items() if key != FOLLOWS_KEY}


def test_wordless_files_of_every_family_follow_its_first_model_on_the_hub(later_on_disk, tmp_path, hub):  # noqa: F811
    family, folder, file = later_on_disk
    wordless = rewrite(file, tmp_path / "wordless.safetensors", lambda tensors: None, metadata={})
    assert family.hub_id == DIFFUSERS_DEFAULT_PIPELINE_PATHS[HUB_KEYS[family.name]]["pretrained_model_name_or_path"]
    with pytest.raises(
        UserError, match=f"the configs and the tokenizer of '{family.hub_id}', and the hub did not give"
    ):
        open_pipeline(ModelSource(wordless))
    hub[family.hub_id] = tmp_path / "part"
    shutil.copytree(folder, tmp_path / "part")
    *_, last = family.tokenizers
    shutil.rmtree(tmp_path / "part" / last)
    with pytest.raises(UserError, match=f"there is no {last} in the part of it that was fetched"):
        open_pipeline(ModelSource(wordless))
    hub[family.hub_id] = folder
    assert same_weights(open_pipeline(ModelSource(wordless)), open_pipeline(ModelSource(folder)))


@pytest.mark.parametrize(
    "told", ["no JSON", "[]", "{}", '{"model_index.json": {}, "../evil.json": {}}', '{"model_index.json": 3}']
)
def test_configs_that_cannot_be_read_are_a_sentence(sd1_file, tmp_path, cache, told):
    file = rewrite(sd1_file, tmp_path / "odd.safetensors", lambda tensors: None, metadata={CONFIGS_KEY: told})
    with pytest.raises(UserError, match=r"its metadata 'dmm\.configs' cannot be read .* --config"):
        open_pipeline(ModelSource(file))
    assert not cache.exists()


def test_exports_open_by_themselves(merged, tmp_path):
    pipe = load_pipeline(merged)
    export_style(pipe, "ink", tmp_path / "ink.safetensors")
    export_all(pipe, tmp_path / "all", single_file=True)
    export_authors(pipe, tmp_path / "authors.safetensors")
    folder = tmp_path / "ink"
    export_style(pipe, "ink", folder)
    assert same_weights(open_pipeline(ModelSource(tmp_path / "ink.safetensors")), open_pipeline(ModelSource(folder)))
    assert same_weights(open_pipeline(ModelSource(tmp_path / "all" / "model.safetensors")), pipe)
    assert style_names(load_pipeline(tmp_path / "authors.safetensors")) == STYLE_NAMES


def test_soups_open_by_themselves_and_soups_of_soups(sd1_folder, sd1_file, tmp_path, pipeline):
    def soup(name, *models):
        teachers = [{"name": f"t{i}", "model": str(model)} for i, model in enumerate(models)]
        return make_soup(SoupRecipe(method="soup", teachers=teachers), tmp_path / name).path

    of_folders = soup("folders.safetensors", sd1_folder, sd1_folder)
    of_files = soup("files.safetensors", sd1_file, of_folders)
    # a folder of files needs configs, which are those that the files say
    folder = soup("folder", of_files, sd1_file)
    for made in (of_folders, of_files, folder):
        assert same_weights(open_pipeline(ModelSource(made)), pipeline)
