"""Soups of real files: identities, streaming, layouts, gates, and outputs that appear whole or not at all."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys

import pytest
import torch
from conftest import tiny_pipeline
from helpers import rewrite, same_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from soup_models import *  # noqa: F403 - fixtures

from dmm.errors import UserError
from dmm.families.sd1 import SD1
from dmm.formats.original_layout import V_PREDICTION_MARK
from dmm.formats.single_file import save_single_file
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.soup import slices, stream, thresholds
from dmm.soup.ledger import read_ledger
from dmm.soup.make import make_soup
from dmm.soup.methods import kept_above, slerp, ties
from dmm.soup.plan import Merged
from dmm.soup.reading import WeightFile
from dmm.soup.recipe import SoupRecipe
from dmm.soup.sources import Kept
from dmm.soup.writing import Declared

CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
METHODS = ["soup", "weighted_sum", "task_arithmetic", "slerp", "model_stock", "ties", "dare", "dare_ties"]


def recipe(models, method="soup", names="ab", suffix=".safetensors", **more):
    teachers = [{"name": name, "model": str(models / f"{name}{suffix}")} for name in names]
    return SoupRecipe(**{"method": method, "base": str(models / f"base{suffix}"), "teachers": teachers, **more})


def test_a_soup_is_the_average_whose_file_says_what_it_is(models, tmp_path, digests):
    made = make_soup(recipe(models), tmp_path / "soup.safetensors", digests=digests)
    soup, a, b = (load_file(path) for path in (made.path, models / "a.safetensors", models / "b.safetensors"))
    assert soup.keys() == a.keys()
    for name in soup:
        assert soup[name].equal(((a[name].double() + b[name].double()) / 2).half()), name
    with safe_open(made.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert made.notes == ()


@pytest.mark.parametrize("method", METHODS)
def test_equal_models_come_out_unchanged(models, tmp_path, digests, method):
    a = str(models / "a.safetensors")
    more = {"density": 1.0} if method in ("ties", "dare", "dare_ties") else {}
    if method in ("task_arithmetic", "dare"):
        more["weights"] = {"x": 0.5, "y": 0.5}
    teachers = [{"name": "x", "model": a}, {"name": "y", "model": a}]
    made = make_soup(recipe(models, method, teachers=teachers, **more), tmp_path / "s.safetensors", digests=digests)
    one, soup = load_file(a), load_file(made.path)
    assert all(one[name].equal(soup[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_the_same_for_any_thread_count_and_length_of_slices_that_elementwise_methods_are_cut_into(
    models, tmp_path, digests, method, monkeypatch
):
    monkeypatch.setattr(slices, "SLICE", slices.ALIGNMENT)
    for threads in (1, 4):
        make_soup(recipe(models, method), tmp_path / str(threads) / "s.safetensors", threads=threads, digests=digests)
    monkeypatch.undo()
    make_soup(recipe(models, method), tmp_path / "long" / "s.safetensors", digests=digests)
    one = (tmp_path / "1" / "s.safetensors").read_bytes()
    assert (tmp_path / "4" / "s.safetensors").read_bytes() == one
    if method not in ("slerp", "model_stock"):  # their sums over whole tensors are rounded by slices
        assert (tmp_path / "long" / "s.safetensors").read_bytes() == one


@pytest.mark.parametrize(("cores", "heavy", "light"), [(1, 1, 1), (2, 2, 1), (6, 6, 3), (64, 8, 8)])
def test_threads_are_as_many_as_cores_or_half_as_many_or_what_was_asked_for_with_a_limit(
    cores, heavy, light, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert (stream.num_threads(), stream.num_threads(light=True)) == (heavy, light)
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert (stream.num_threads(), stream.num_threads(light=True)) == (heavy, light)
    assert (stream.num_threads(3), stream.num_threads(3, light=True), stream.num_threads(99)) == (3, 3, 8)


def test_streamed_thresholds_and_norms_are_those_of_whole_tensors(models, tmp_path, digests, monkeypatch):
    monkeypatch.setattr(slices, "SLICE", slices.ALIGNMENT)
    monkeypatch.setattr(thresholds, "_SMALL", 100)
    base, a, b = (load_file(models / f"{name}.safetensors") for name in ("base", "a", "b"))
    for method, expected in {
        "ties": lambda name: ties(base[name].float(), [a[name].float(), b[name].float()], [0.5, 0.5], density=0.3),
        "slerp": lambda name: slerp([a[name].float(), b[name].float()], [0.5, 0.5]),
    }.items():
        more = {"density": 0.3} if method == "ties" else {}
        made = make_soup(recipe(models, method, **more), tmp_path / f"{method}.safetensors", digests=digests)
        found = load_file(made.path)
        assert all(found[name].equal(expected(name).half()) for name in found), method


def spread_evenly(values):
    return values


def mostly_equal(values):
    return torch.where(values > 0.8, values, 0.0)


def all_equal(values):
    return torch.full_like(values, 0.5)


def in_order(values):
    return values.sort().values


def rare_and_large(values):
    """Where no sample falls."""
    values[1000:1200] *= 1000
    return values


@pytest.mark.parametrize("density", [1e-6, 0.01, 0.2, 0.97, 1.0])
@pytest.mark.parametrize("kind", [spread_evenly, mostly_equal, all_equal, in_order, rare_and_large])
def test_thresholds_are_exact_however_values_are_spread(kind, density, tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SLICE", slices.ALIGNMENT)
    count = 2**16 + 100
    spread = [kind(torch.rand(count, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    models = {"base": torch.zeros(count), "a": spread[0], "b": -spread[1]}
    for name, values in models.items():
        save_file({"w": values.half()}, tmp_path / f"{name}.safetensors")
    files = {name: WeightFile(tmp_path / f"{name}.safetensors") for name in models}
    base, *sources = (Kept(file, "w", (count,)) for file in files.values())
    tensor = Merged("w", Declared(torch.float16, (count,)), tuple(sources), (0.5, 0.5), base)
    seen = []
    found = thresholds.thresholds(tensor, density, seen.append)
    assert found.tolist() == [kept_above(values.half().abs(), density) for values in spread]
    assert sum(seen) == count
    for file in files.values():
        file.close()


def test_slerps_ends_are_its_models(models, tmp_path, digests):
    for weights, name in (({"a": 1, "b": 0}, "a"), ({"a": 0, "b": 1}, "b")):
        made = make_soup(recipe(models, "slerp", weights=weights), tmp_path / f"{name}.safetensors", digests=digests)
        model, soup = load_file(models / f"{name}.safetensors"), load_file(made.path)
        assert all(model[key].equal(soup[key]) for key in model)


def test_layouts_mix_and_either_comes_out(models, tmp_path, digests):
    teachers = [{"name": "a", "model": str(models / "a")}, {"name": "b", "model": str(models / "b.safetensors")}]
    mixed = SoupRecipe(method="soup", teachers=teachers, precision="fp32")
    folder = make_soup(mixed, tmp_path / "soup", digests=digests).path
    file = make_soup(mixed, tmp_path / "soup.safetensors", digests=digests).path
    one, other = open_pipeline(ModelSource(folder)), open_pipeline(ModelSource(file, config=folder))
    assert same_weights(one, other)
    a, b = (open_pipeline(ModelSource(models / name)) for name in "ab")
    for name, tensor in one.unet.state_dict().items():
        # b is kept in half precision
        mean = (a.unet.state_dict()[name].double() + b.unet.state_dict()[name].half().double()) / 2
        assert tensor.equal(mean.float()), name
    with safe_open(folder / "text_encoder" / "model.safetensors", "pt") as saved:
        assert all(name.startswith("text_model.") for name in saved.keys())  # noqa: SIM118 - not a mapping
    assert {file.name for file in (folder / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}


def test_single_files_make_a_folder_by_the_configs_that_they_say_or_are_given(models, tmp_path, digests):
    said = make_soup(recipe(models), tmp_path / "said", digests=digests)
    given = make_soup(recipe(models, config=str(models / "base")), tmp_path / "given", digests=digests)
    assert same_weights(open_pipeline(ModelSource(said.path)), open_pipeline(ModelSource(given.path)))


def test_precisions(models, tmp_path, digests):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        made = make_soup(recipe(models, precision=precision), tmp_path / f"{precision}.safetensors", digests=digests)
        assert {tensor.dtype for tensor in load_file(made.path).values()} == {dtype}


def test_blocks_and_lists_weigh_parts_of_the_model(models, tmp_path, digests):
    a, b = (load_file(models / f"{name}.safetensors") for name in "ab")
    blocks = {"IN01": {"a": 1, "b": 0}, "/attn2/": {"a": 0, "b": 1}}
    made = make_soup(recipe(models, "weighted_sum", blocks=blocks), tmp_path / "1.safetensors", digests=digests)
    soup = load_file(made.path)
    assert soup[CONV].equal(a[CONV])
    attention = CONV.replace("0.in_layers.2", "1.transformer_blocks.0.attn2.to_k")
    assert soup[attention].equal(b[attention])
    assert soup[TEXT].equal(((a[TEXT].double() + b[TEXT].double()) / 2).half())
    # a tiny model has four blocks on either side
    made = make_soup(
        recipe(models, "weighted_sum", mbw={"b": [1, *[0] * 4, 0, *[1] * 4]}),
        tmp_path / "2.safetensors",
        digests=digests,
    )
    soup = load_file(made.path)
    assert soup[TEXT].equal(b[TEXT])
    assert soup[CONV].equal(a[CONV])
    with pytest.raises(UserError, match="found 3 weights; these models have 10 blocks"):
        make_soup(recipe(models, "weighted_sum", mbw={"b": [1, 1, 0]}), tmp_path / "3.safetensors", digests=digests)


def test_the_text_encoder_may_be_the_bases(models, tmp_path, digests):
    made = make_soup(recipe(models, text_encoder="base"), tmp_path / "s.safetensors", digests=digests)
    base, soup = load_file(models / "base.safetensors"), load_file(made.path)
    assert soup[TEXT].equal(base[TEXT])
    assert not soup[CONV].equal(base[CONV])


def test_position_ids_stay_whole_numbers_from_zero(models, tmp_path, digests):
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"

    def damage(tensors):
        tensors[name] = torch.arange(24).half()[None]
        tensors[name][0, 5] = 4.996

    bad = rewrite(models / "a.safetensors", tmp_path / "a.safetensors", damage)
    teachers = [{"name": "a", "model": str(bad)}, {"name": "b", "model": str(models / "b.safetensors")}]
    made = make_soup(SoupRecipe(method="soup", teachers=teachers), tmp_path / "s.safetensors", digests=digests)
    assert load_file(made.path)[name].equal(torch.arange(24)[None])
    assert "is damaged in" in made.notes[0]


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_with_header(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def overlap(path):
    header, data = header_of(path)
    first, second = header[CONV]["data_offsets"]
    header[CONV]["data_offsets"] = [first - 2, second - 2]
    write_with_header(path, header, data)


def leave_a_hole(path):
    header, data = header_of(path)
    at = header[CONV]["data_offsets"][0]
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= at:
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    write_with_header(path, header, data[:at] + bytes(8) + data[at:])


def claim_a_large_header(path):
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def put_nan(path):
    rewrite(path, path, lambda tensors: tensors[CONV].view(-1).__setitem__(7, float("nan")))


def put_infinity(path):
    rewrite(path, path, lambda tensors: tensors[CONV].view(-1).__setitem__(7, float("inf")))


def lose_a_key(path):
    rewrite(path, path, lambda tensors: tensors.pop(CONV))


def change_a_shape(path):
    rewrite(path, path, lambda tensors: tensors.update({CONV: tensors[CONV][:2].clone()}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"b\.safetensors is cut short: .*within '"),
        (overlap, rf"b\.safetensors .*'{CONV}' overlaps"),
        (leave_a_hole, rf"b\.safetensors .*'{CONV}' leaves a hole of 8 bytes"),
        (claim_a_large_header, r"b\.safetensors is not a safetensors file: its header"),
        (put_nan, rf"b\.safetensors: '{CONV}' holds values that are NaN"),
        (put_infinity, rf"b\.safetensors: '{CONV}' holds values that are NaN or infinite"),
        (lose_a_key, rf"b\.safetensors lacks '{CONV}', which base has"),
        (change_a_shape, rf"'{CONV}' has shape \(2, .*in teacher 'b'"),
    ],
)
def test_damaged_files_are_refused_by_file_and_key_before_anything_is_written(
    models, tmp_path, digests, damage, message
):
    bad = shutil.copy(models / "b.safetensors", tmp_path / "b.safetensors")
    damage(bad)
    teachers = [{"name": "a", "model": str(models / "a.safetensors")}, {"name": "b", "model": str(bad)}]
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        make_soup(recipe(models, teachers=teachers), tmp_path / "out" / "s.safetensors", digests=digests)
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_keys_do_as_the_recipe_says(models, tmp_path, digests):
    less = shutil.copy(models / "b.safetensors", tmp_path / "b.safetensors")
    lose_a_key(less)
    teachers = [{"name": "a", "model": str(models / "a.safetensors")}, {"name": "b", "model": str(less)}]
    for missing, source in (("base", "base"), ("present", "a")):
        one = recipe(models, teachers=teachers, missing=missing)
        made = make_soup(one, tmp_path / f"{missing}.safetensors", digests=digests)
        assert load_file(made.path)[CONV].equal(load_file(models / f"{source}.safetensors")[CONV])


def test_families_and_prediction_types_must_agree(models, tmp_path, digests):
    save_file({"conditioner.embedders.0.x": torch.ones(2)}, tmp_path / "xl.safetensors")
    xl = [{"name": "xl", "model": str(tmp_path / "xl.safetensors")}]
    with pytest.raises(UserError, match=r"teacher 'xl': .*xl\.safetensors is SDXL, base SD 1\.x"):
        make_soup(recipe(models, teachers=xl), tmp_path / "s.safetensors", digests=digests)
    save_single_file(tiny_pipeline(prediction_type="v_prediction"), tmp_path / "v.safetensors")
    v = [{"name": "v", "model": str(tmp_path / "v.safetensors")}]
    with pytest.raises(UserError, match=r"teacher 'v': .* predicts v_prediction, base epsilon"):
        make_soup(recipe(models, teachers=v), tmp_path / "s.safetensors", digests=digests)


def test_v_prediction_is_kept_by_word_and_mark(tmp_path, digests):
    save_single_file(tiny_pipeline(prediction_type="v_prediction"), tmp_path / "v.safetensors")
    add_mark = rewrite(
        tmp_path / "v.safetensors",
        tmp_path / "mark.safetensors",
        lambda tensors: tensors.update({V_PREDICTION_MARK: torch.empty(0)}),
        metadata={},
    )
    teachers = [{"name": "a", "model": str(tmp_path / "v.safetensors")}, {"name": "b", "model": str(add_mark)}]
    made = make_soup(SoupRecipe(method="soup", teachers=teachers), tmp_path / "s.safetensors", digests=digests)
    with safe_open(made.path, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
        assert V_PREDICTION_MARK in file.keys()  # noqa: SIM118 - not a mapping


def test_a_lora_on_a_model_is_fused_as_the_merge_fuses_it(models, tmp_path, digests):
    from peft import LoraConfig

    from dmm.formats.lora import save_kohya_lora

    pipe = tiny_pipeline()
    torch.manual_seed(5)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=["to_q", "conv1"]))
    save_kohya_lora(tmp_path / "lora.safetensors", {"unet": pipe.unet}, SD1)
    teachers = [{"name": "a", "lora": str(tmp_path / "lora.safetensors"), "lora_scale": 0.7}]
    one = SoupRecipe(method="soup", base=str(models / "base"), teachers=teachers)
    soup = open_pipeline(ModelSource(make_soup(one, tmp_path / "soup", digests=digests).path))
    fused = open_pipeline(ModelSource(models / "base", loras=((tmp_path / "lora.safetensors", 0.7),)))
    for name, tensor in fused.unet.state_dict().items():
        torch.testing.assert_close(soup.unet.state_dict()[name], tensor)
    plain = open_pipeline(ModelSource(models / "base"))
    assert not same_weights(plain, soup)

    # two of them: the same change in two halves, and a ledger that makes it again
    halves = [{"path": str(tmp_path / "lora.safetensors"), "scale": 0.35}] * 2
    two = SoupRecipe(method="soup", base=str(models / "base"), teachers=[{"name": "a", "loras": halves}])
    made = make_soup(two, tmp_path / "two.safetensors", digests=digests)
    twice = open_pipeline(ModelSource(made.path, config=models / "base"))
    for name, tensor in fused.unet.state_dict().items():
        torch.testing.assert_close(twice.unet.state_dict()[name], tensor)
    ledger = read_ledger(made.path)
    assert ledger.recipe == two
    assert ledger.entries[0]["source"] == "lora.safetensors, lora.safetensors"


def test_hashes_are_kept_by_path_size_and_time(models, tmp_path, digests):
    path = shutil.copy(models / "a.safetensors", tmp_path / "a.safetensors")
    one = SoupRecipe(method="soup", teachers=[{"name": "a", "model": str(path)}])
    make_soup(one, tmp_path / "s.safetensors", digests=digests)
    stat = path.stat()
    assert digests.get(path, (stat.st_size, stat.st_mtime_ns)) is not None
    assert digests.get(path, (stat.st_size, stat.st_mtime_ns + 1)) is None


def test_outputs_have_the_users_umask(models, tmp_path, digests):
    before = os.umask(0o027)
    try:
        made = make_soup(recipe(models), tmp_path / "s.safetensors", digests=digests)
    finally:
        os.umask(before)
    assert made.path.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_nothing(models, tmp_path, digests, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UserError, match="could not be written: No space left"):
        make_soup(recipe(models), tmp_path / "out" / "s.safetensors", digests=digests)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_run_leaves_nothing_under_the_final_name(models, tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from dmm.soup import stream
from dmm.soup.ledger import read_ledger
from dmm.soup.make import make_soup
from dmm.soup.reading import Digests
from dmm.soup.recipe import SoupRecipe
from dmm.soup.sources import Kept
from dmm.soup.writing import NewWeightFile
write, done = NewWeightFile.write, []
def die(self, *args):
    write(self, *args)
    done.append(1)
    if len(done) == 100:
        os.kill(os.getpid(), signal.SIGKILL)
NewWeightFile.write = die
teachers = [{{"name": "a", "model": {str(models / "a.safetensors")!r}}}]
recipe = SoupRecipe(method="soup", teachers=teachers)
make_soup(recipe, Path({str(tmp_path / "s.safetensors")!r}), digests=Digests(Path({str(tmp_path / "d.json")!r})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "s.safetensors").exists()
