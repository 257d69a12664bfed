"""What a soup says of itself, and what can be made of that."""

import json
import shutil

import pytest
from helpers import rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from soup_models import *  # noqa: F403 - fixtures

from dmm.errors import UserError
from dmm.files.digest import sha256
from dmm.formats.tensors import read_header
from dmm.soup.cook import cook
from dmm.soup.ledger import read_ledger, with_more, without
from dmm.soup.recipe import SoupRecipe


@pytest.fixture
def shelf(models, tmp_path):
    """Models of one's own, beside which soups are made."""
    for name in ("base", "a", "b", "c"):
        shutil.copy(models / f"{name}.safetensors", tmp_path)
    return tmp_path


def soup(shelf, output, names="abc", **keys):
    teachers = [{"name": name, "model": str(shelf / f"{name}.safetensors")} for name in names]
    more = {"method": "soup", **keys}
    return cook(SoupRecipe(teachers=teachers, **more), shelf / output).path


METHODS = [
    {"method": "soup"},
    {"method": "weighted_sum", "weights": {"a": 1, "b": 2, "c": 4}, "blocks": {"IN00": {"b": 3}, "/attn/": {"a": 2}}},
    {"method": "ties", "density": 0.5},
    {"method": "dare_ties"},
    {"method": "model_stock"},
]


def kept_of(keys, names):
    """The recipe's keys without those of other teachers."""
    kept = dict(keys)
    if "weights" in keys:
        kept["weights"] = {name: weight for name, weight in keys["weights"].items() if name in names}
        blocks = {p: {n: w for n, w in by.items() if n in names} for p, by in keys["blocks"].items()}
        kept["blocks"] = {pattern: by for pattern, by in blocks.items() if by}
    return kept


@pytest.mark.parametrize("keys", METHODS, ids=lambda keys: keys["method"])
def test_a_shard_that_is_removed_was_never_there_bit_for_bit(shelf, keys):
    keys = {"base": str(shelf / "base.safetensors"), **keys}
    never = soup(shelf, "never.safetensors", "ac", **kept_of(keys, "ac"))
    ledger = read_ledger(soup(shelf, "all.safetensors", **keys))
    removed = cook(without(ledger, "b"), shelf / "removed.safetensors", ledger=ledger).path
    assert removed.read_bytes() == never.read_bytes()  # the ledger too
    told = read_header(removed).metadata
    assert '"b"' not in told["sd_merge_recipe"] + told["sd_merge_models"]


def test_a_shard_that_is_added_was_always_there_wherever_it_stands(shelf):
    whole = soup(shelf, "all.safetensors", "cab")
    ledger = read_ledger(soup(shelf, "two.safetensors", "ac"))
    added = cook(with_more(ledger, "b", str(shelf / "b.safetensors"), None), shelf / "added.safetensors", ledger=ledger)
    assert added.path.read_bytes() == whole.read_bytes()


def test_a_soup_is_made_again_from_its_own_metadata(shelf):
    keys = {"method": "dare_ties", "base": str(shelf / "base.safetensors"), "seed": 3, "shards": {"b": "birds"}}
    first = soup(shelf, "first.safetensors", **keys)
    ledger = read_ledger(first)
    assert cook(ledger.recipe, shelf / "again.safetensors", ledger=ledger).path.read_bytes() == first.read_bytes()


def test_the_ledger_names_shards_hashes_weights_and_nothing_of_the_place(shelf):
    keys = {"method": "weighted_sum", "weights": {"a": 3, "b": 1, "c": 0}, "shards": {"a": "apples"}}
    path = soup(shelf, "soup.safetensors", **keys)
    a, b, _ = read_ledger(path).entries
    digest = sha256(shelf / "a.safetensors")
    assert a == {"name": "a", "source": "a.safetensors", "sha256": digest, "weight": 0.75, "trained_on": "apples"}
    assert b["weight"] == 0.25
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["sd_merge_models"])[digest]["name"] == "a.safetensors"
    assert metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors, c.safetensors"
    assert str(shelf) not in str(metadata)


def test_a_soup_of_soups_tells_of_both(shelf):
    inner = soup(shelf, "inner.safetensors", "ab")
    teachers = [{"name": "inner", "model": str(inner)}, {"name": "c", "model": str(shelf / "c.safetensors")}]
    outer = cook(SoupRecipe(method="soup", teachers=teachers), shelf / "outer.safetensors").path
    with safe_open(outer, "pt") as file:
        models = json.loads(file.metadata()["sd_merge_models"])
    assert models[sha256(inner)]["sd_merge_recipe"]["recipe"]["teachers"][0]["name"] == "a"


def test_another_model_in_the_place_of_one_is_refused(shelf):
    ledger = read_ledger(soup(shelf, "soup.safetensors"))
    rewrite(shelf / "a.safetensors", shelf / "a.safetensors", lambda tensors: next(iter(tensors.values())).mul_(2))
    with pytest.raises(UserError, match="teacher 'a' is not what the soup was made of"):
        cook(ledger.recipe, shelf / "again.safetensors", ledger=ledger)
    assert not (shelf / "again.safetensors").exists()


def test_moved_models_are_found_where_one_says(shelf):
    path = soup(shelf, "soup.safetensors")
    (shelf / "moved").mkdir()
    for name in "abc":
        (shelf / f"{name}.safetensors").rename(shelf / "moved" / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"there is no file or folder .*--models"):
        read_ledger(path)
    ledger = read_ledger(path, shelf / "moved")
    again = cook(ledger.recipe, shelf / "again.safetensors", ledger=ledger).path
    one, other = load_file(path), load_file(again)
    assert all(one[name].equal(other[name]) for name in one)


def test_folders_have_ledgers_too(models, tmp_path):
    for name in "ab":
        shutil.copytree(models / name, tmp_path / name)
    teachers = [{"name": name, "model": str(tmp_path / name)} for name in "ab"]
    path = cook(SoupRecipe(method="soup", teachers=teachers), tmp_path / "soup").path
    ledger = read_ledger(path)
    assert [entry["source"] for entry in ledger.entries] == ["a", "b"]
    alone = cook(without(ledger, "a"), tmp_path / "b-alone", ledger=ledger).path
    one, b = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (alone, tmp_path / "b"))
    assert all(one[name].equal(b[name]) for name in b)


@pytest.mark.parametrize(
    "place", ["a.safetensors", "alias.safetensors", "model", "model/unet/diffusion_pytorch_model.safetensors"]
)
def test_a_soup_is_not_written_over_what_it_is_made_of(models, shelf, place):
    shutil.copytree(models / "b", shelf / "model")
    (shelf / "alias.safetensors").symlink_to("a.safetensors")
    before = {path: path.read_bytes() for path in shelf.rglob("*") if path.is_file()}
    teachers = [{"name": "a", "model": str(shelf / "a.safetensors")}, {"name": "b", "model": str(shelf / "model")}]
    with pytest.raises(UserError, match="is what the soup is made of"):
        cook(SoupRecipe(method="soup", teachers=teachers), shelf / place, overwrite=True)
    assert {path: path.read_bytes() for path in shelf.rglob("*") if path.is_file()} == before


def test_a_soup_may_be_written_over_itself(shelf):
    made = soup(shelf, "soup.safetensors", "ab")
    again = with_more(read_ledger(made), "c", str(shelf / "c.safetensors"), None)
    assert read_ledger(cook(again, made, overwrite=True).path).recipe.names == ["a", "b", "c"]


def test_what_cannot_be_changed(shelf):
    ledger = read_ledger(soup(shelf, "soup.safetensors", "a"))
    for change, message in (
        (lambda: without(ledger, "b"), "no shard 'b'"),
        (lambda: without(ledger, "a"), "only shard"),
        (lambda: with_more(ledger, "a", str(shelf / "b.safetensors"), None), "has a shard 'a' already"),
        (lambda: with_more(ledger, "b", str(shelf / "b.safetensors"), 0.5), "takes no weights"),
        (lambda: read_ledger(shelf / "a.safetensors"), "has no ledger"),
    ):
        with pytest.raises(UserError, match=message):
            change()


@pytest.mark.parametrize("told", ["{not json", "[" * 5000 + "]" * 5000, "3", '"\\ud800"'])
def test_what_other_tools_say_of_a_merge_may_be_unreadable(shelf, told):
    odd = shelf / "odd.safetensors"
    save_file(load_file(shelf / "a.safetensors"), odd, {"sd_merge_recipe": told})
    with pytest.raises(UserError, match="has no ledger"):
        read_ledger(odd)
    teachers = [{"name": "odd", "model": str(odd)}, {"name": "b", "model": str(shelf / "b.safetensors")}]
    assert read_ledger(cook(SoupRecipe(method="soup", teachers=teachers), shelf / "of-odd.safetensors").path)
