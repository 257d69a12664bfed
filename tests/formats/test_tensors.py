import os
import stat
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm.errors import UserError
from dmm.formats.tensors import check_finite, read_header, read_tensors, write_tensors


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3, dtype=torch.float16), "b": torch.zeros(())}, path, {"k": "v"})
    return path


def test_a_header_has_names_shapes_dtypes_and_metadata_but_no_values(file):
    header = read_header(file)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in header.tensors.items()} == {
        "a": ((2, 3), torch.float16),
        "b": ((), torch.float32),
    }
    assert header.metadata == {"k": "v"}
    assert all(tensor.is_meta for tensor in header.tensors.values())


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"x\.safetensors: no such file"):
        read_header(tmp_path / "x.safetensors")


def test_an_empty_file(tmp_path):
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(UserError, match=r"x\.safetensors is empty"):
        read_header(tmp_path / "x.safetensors")


def test_a_file_cut_short_tells_both_sizes(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=f"cut short: its header declares {len(whole)} bytes, .* {len(whole) - 5}"):
        read_header(file)


def test_a_header_cut_short(file):
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    file.write_bytes(whole[:40])
    with pytest.raises(UserError, match=f"its header alone takes {8 + length} bytes, the file has 40"):
        read_header(file)


def test_bytes_too_many(file):
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UserError, match="bytes too many"):
        read_header(file)


def test_a_web_page_for_weights(tmp_path):
    (tmp_path / "x.safetensors").write_text("<!doctype html><html><body>Sign in</body></html>")
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_a_git_lfs_pointer(tmp_path):
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match=r"Git LFS pointer.*git lfs pull"):
        read_header(tmp_path / "x.safetensors")


def test_overlapping_tensors(tmp_path):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f'{{"a":{entry},"b":{entry}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_pickles_are_refused_whatever_their_name(tmp_path):
    for name in ("x.ckpt", "x.safetensors"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a pickle, .* allow pickles"):
            read_header(tmp_path / name)


def test_allowed_pickles_give_their_tensors(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "x.ckpt")
    header = read_header(tmp_path / "x.ckpt", allow_pickle=True)
    assert header.tensors["a"].is_meta
    assert read_tensors(tmp_path / "x.ckpt")["a"].equal(torch.ones(2))


def test_a_pickle_with_a_wrong_name(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="a pickle by content but not by name"):
        read_header(tmp_path / "x.safetensors", allow_pickle=True)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(tmp_path / "x.safetensors", {"a": shared, "b": shared}, {})
    assert not list(tmp_path.iterdir())


def test_written_tensors_are_read_back(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(6.0).reshape(2, 3).T}, {"k": "v"})
    assert load_file(tmp_path / "x.safetensors")["a"].equal(torch.arange(6.0).reshape(2, 3).T)
    assert read_header(tmp_path / "x.safetensors").metadata == {"k": "v"}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_has_the_mode_that_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


def test_finite_values_pass_however_large_their_sum():
    check_finite({"a": torch.full((8,), 3e38), "b": torch.tensor([2**62]), "c": torch.zeros(0)}, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(value):
    with pytest.raises(UserError, match=r"^x: 2 of the 6 values of 'b' are NaN or infinite in torch\.float16"):
        check_finite({"a": torch.ones(2), "b": torch.tensor([1, value, 2, value, 3, 4]).half()}, "x")


def test_the_same_tensors_and_metadata_make_the_same_bytes(tmp_path):
    metadata = {f"key {i} ✓": "value" for i in range(8)}
    for name in ("a", "b"):
        write_tensors(tmp_path / name, {"x": torch.arange(3.0), "y": torch.zeros(2)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("x"), torch.arange(3.0))
