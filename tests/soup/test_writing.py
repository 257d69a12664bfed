"""A new weight file says what was written to it, in whatever order and stretches."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from dmm.soup import writing
from dmm.soup.writing import Declared, NewWeightFile


def test_what_is_put_on_the_disk_in_stretches_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_STRETCH", 1000)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(True))
    values = torch.arange(2000, dtype=torch.float32)
    file = NewWeightFile(tmp_path / "new.safetensors", {"a": Declared(torch.float32, (40, 50))}, {})
    for start in reversed(range(0, 2000, 100)):
        file.write("a", start, values[start : start + 100])
    file.close()
    assert len(synced) == 20 // 3  # every third 400 bytes pass a thousand
    assert torch.equal(load_file(tmp_path / "new.safetensors")["a"], values.view(40, 50))


@pytest.mark.parametrize("past_cache", ["as the system can", "not at all", "not this file system"])
def test_what_is_made_in_its_room_is_whole_however_blocks_fall(tmp_path, monkeypatch, past_cache):
    if past_cache == "not at all":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif past_cache == "not this file system":
        monkeypatch.setattr(writing, "_open_past_cache", lambda path: os.open(path, os.O_WRONLY))
        monkeypatch.setattr(os, "pwrite", refusing(os.pwrite, []))
    values = {
        "big": torch.randn(50_000, generator=torch.Generator().manual_seed(0)),
        "half": torch.arange(20_001).half(),
        "tiny": torch.arange(7, dtype=torch.uint8),
    }
    declared = {name: Declared(tensor.dtype, tuple(tensor.shape)) for name, tensor in values.items()}
    file = NewWeightFile(tmp_path / "new.safetensors", declared, {"any": "thing"})
    for name, tensor in values.items():
        for start in reversed(range(0, len(tensor), 9_999)):
            stop = min(len(tensor), start + 9_999)
            room = file.room(name, start, stop)
            room.copy_(tensor[start:stop])
            file.write(name, start, room)
    file.sync()
    file.close()
    written = load_file(tmp_path / "new.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in values.items())


def refusing(pwrite, descriptors):
    """Takes what is written to the first descriptor that it sees alone: the header's, which goes through the cache."""

    def write(descriptor, data, at):
        descriptors.append(descriptor)
        if descriptor != descriptors[0]:
            raise OSError(errno.EINVAL, "not so")
        return pwrite(descriptor, data, at)

    return write


def test_whole_blocks_go_past_the_cache(tmp_path, monkeypatch):
    """Seen by the addresses, which are what the system asks for."""
    file = NewWeightFile(tmp_path / "new.safetensors", {"a": Declared(torch.float16, (30_000,))}, {})
    blocks = []

    def note(self, at, data):
        blocks.append((at, len(data)))
        return len(data)

    monkeypatch.setattr(NewWeightFile, "_write_past_cache", note)
    file.write("a", 0, file.room("a", 0, 30_000).zero_())
    file.close()
    [(at, length)] = blocks
    assert at % 4096 == length % 4096 == 0
    assert length > 60_000 - 2 * 4096
