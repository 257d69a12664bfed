"""What is told of a weight file without torch: fast, and in the words of what reads it whole."""

import pytest
import torch
from safetensors.torch import save_file

from dmm.errors import UserError
from dmm.files.weights import check_beginning, check_model_file, is_lora_file, read_declared


@pytest.fixture
def lora(tmp_path):
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(1, 2)}, tmp_path / "lora.safetensors", {"rank": "1"})
    return tmp_path / "lora.safetensors"


def test_a_header_is_its_entries_and_where_data_begin(lora):
    declared, start = read_declared(lora)
    assert declared["__metadata__"] == {"rank": "1"}
    assert declared["lora_unet_mid.lora_down.weight"]["shape"] == [1, 2]
    assert start + 8 == lora.stat().st_size


def test_a_lora_is_no_model(lora, tmp_path):
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("no header")
    assert is_lora_file(lora)
    assert not any(map(is_lora_file, (tmp_path, tmp_path / "model.safetensors", tmp_path / "text.safetensors")))
    check_model_file(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is a LoRA, not a full model"):
        check_model_file(lora)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.ckpt", b"PK\x03\x04", "a pickle, which can run code"),
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", b"GGUF", "a GGUF file"),
        ("model.safetensors", b"version https://git-lfs", "a Git LFS pointer"),
        ("model.bin", b"weights", "neither a pickle nor named"),
        ("model.safetensors", b"\xff\0\0\0\0\0\0\0", "is cut short: its header alone takes 263 bytes, the file has 8"),
        ("model.safetensors", b"\2\0\0\0\0\0\0\0[]", "its header cannot be read"),
    ],
)
def test_what_begins_as_no_model_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_model_file(tmp_path / name)


def test_pickles_are_allowed_by_name_and_by_word(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02")
    assert check_beginning(tmp_path / "model.ckpt", allow_pickle=True)
    with pytest.raises(UserError, match="by content but not by name"):
        check_beginning(tmp_path / "model.safetensors", allow_pickle=True)
