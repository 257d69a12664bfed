"""A pipeline folder that the newest libraries wrote opens in what reads the older form, too."""

import json
import shutil

import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from dmm.errors import UserError
from dmm.formats.completing import complete_folder

WORDS = ["a red cat", "The CAT, cattier!", "naïve 猫"]


def tokenizer_with_merges():
    alphabet = sorted(ByteLevel.alphabet())
    merged = ["ca", "cat</w>", "re", "red</w>"]
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *merged, "<|startoftext|>", "<|endoftext|>"]
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=24)


@pytest.fixture
def folder(tmp_path):
    pipe = tiny_pipeline()
    pipe.tokenizer = tokenizer_with_merges()
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_vocabulary_beside_the_tokenizer_says_the_same(folder, tmp_path):
    assert not (folder / "tokenizer/vocab.json").exists()
    complete_folder(folder)
    whole = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert json.loads((folder / "tokenizer/vocab.json").read_text(encoding="utf-8")) == whole.get_vocab()
    version, *merges = (folder / "tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
    assert version == "#version: 0.2"  # the line that transformers 4 skips
    assert merges == ["c a", "ca t</w>", "r e", "re d</w>"]
    # what reads nothing but these two
    older = shutil.copytree(folder / "tokenizer", tmp_path / "older", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert CLIPTokenizer.from_pretrained(older)(WORDS).input_ids == tokenizer_with_merges()(WORDS).input_ids
    assert whole(WORDS).input_ids == tokenizer_with_merges()(WORDS).input_ids
    assert whole("red cat").input_ids[1:-1] == [515, 513]


def test_a_vocabulary_that_is_there_stays(folder):
    (folder / "tokenizer/vocab.json").write_text("{}", encoding="utf-8")
    complete_folder(folder)
    assert (folder / "tokenizer/vocab.json").read_text(encoding="utf-8") == "{}"


def test_a_second_tokenizer_and_text_encoder_get_theirs_too(folder):
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    complete_folder(folder)
    assert (folder / "tokenizer_2/merges.txt").is_file()
    assert all(name.startswith("text_model.") for name in load_file(folder / "text_encoder_2/model.safetensors"))


def test_text_encoders_load_in_the_dtype_of_the_rest(tmp_path):
    pipe = tiny_pipeline()
    pipe.text_encoder.to(torch.float16)
    pipe.save_pretrained(tmp_path)
    config = tmp_path / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": "float16"}))
    complete_folder(tmp_path)
    told = json.loads(config.read_text())
    assert told["dtype"] == "float32"
    assert "torch_dtype" not in told


def test_twice_is_once(folder):
    complete_folder(folder)
    once = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    complete_folder(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == once


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer/tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer that can be read"):
        complete_folder(folder)
