import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from dmm.data.rows import SHARD_ROWS, cached_rows
from dmm.errors import UserError

NUM_ROWS = SHARD_ROWS * 2 + 5


def content(rows):
    generator = torch.Generator().manual_seed(rows.start)
    return {"a": torch.randn(len(rows), 3, 2, generator=generator).half(), "b": torch.tensor(rows).half()[:, None]}


@pytest.fixture
def cache(tmp_path):
    """A cache of ``NUM_ROWS`` rows, and what it was asked to make."""
    made = []

    def build(num_rows=NUM_ROWS, key=lambda rows: f"rows-{rows.start}-{rows.stop}", make=content):
        def counted(rows):
            made.append(rows.start)
            return make(rows)

        return cached_rows(tmp_path, num_rows, key, counted, lambda _: None)

    return SimpleNamespace(build=build, made=made, folder=tmp_path)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_come_back_in_any_order_and_repeated(cache):
    stored = cache.build()
    everything = {name: stored.read(torch.arange(NUM_ROWS))[name] for name in ("a", "b")}
    asked = torch.tensor([NUM_ROWS - 1, 0, SHARD_ROWS, 0, SHARD_ROWS - 1])
    answer = stored.read(asked)
    assert len(stored) == NUM_ROWS
    assert answer["b"][:, 0].tolist() == asked.tolist()
    assert answer["a"].dtype == torch.float32
    assert answer["a"].equal(everything["a"][asked])
    assert everything["a"][:SHARD_ROWS].equal(content(range(SHARD_ROWS))["a"].float())


def test_what_is_cached_is_not_made_again(cache):
    cache.build()
    before = bytes_of(cache.folder)
    cache.build()
    assert cache.made == [0, SHARD_ROWS, 2 * SHARD_ROWS]
    assert bytes_of(cache.folder) == before


def test_a_set_that_grew_makes_only_what_is_new(cache):
    cache.build()
    cache.build(NUM_ROWS + 1)
    assert cache.made[3:] == [2 * SHARD_ROWS]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[:50],
        lambda data: b"",
        lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:],
    ],
    ids=["cut short", "cut in its header", "empty", "one bit"],
)
def test_a_damaged_shard_is_made_again_with_a_note(cache, caplog, damage):
    cache.build()
    before = bytes_of(cache.folder)
    path = cache.folder / f"rows-{SHARD_ROWS}-{2 * SHARD_ROWS}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        cache.build()
    assert cache.made[3:] == [SHARD_ROWS]
    assert [record.getMessage() for record in caplog.records] == [f"{path} is damaged; it is made again."]
    assert bytes_of(cache.folder) == before


def test_an_interrupted_run_goes_on_where_it_stopped(cache, tmp_path):
    whole = tmp_path / "whole"
    cached_rows(whole, NUM_ROWS, lambda rows: f"rows-{rows.start}-{rows.stop}", content, lambda _: None)

    def interrupted(rows):
        if rows.start == SHARD_ROWS:
            raise KeyboardInterrupt
        return content(rows)

    with pytest.raises(KeyboardInterrupt):
        cache.build(make=interrupted)
    cache.build()
    assert cache.made == [0, SHARD_ROWS, SHARD_ROWS, 2 * SHARD_ROWS]
    whole_bytes = bytes_of(whole)
    assert {name: (cache.folder / name).read_bytes() for name in whole_bytes} == whole_bytes


def test_shards_are_plain_safetensors(cache):
    cache.build()
    with safe_open(cache.folder / f"rows-0-{SHARD_ROWS}.safetensors", framework="pt") as file:
        assert file.get_slice("a").get_shape() == [SHARD_ROWS, 3, 2]
        assert list(file.metadata()) == ["sha256"]


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="is not a folder"):
        cached_rows(tmp_path / "file", 1, lambda _: "key", content, lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_read_under_autocast_as_they_are(tmp_path, dtype):
    values = torch.randn(NUM_ROWS, 3).to(dtype)
    rows = cached_rows(tmp_path, NUM_ROWS, str, lambda rows: {"a": values[rows.start : rows.stop]}, lambda _: None)
    asked = torch.tensor([NUM_ROWS - 1, 0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rows.read(asked)["a"], values[asked].float())
