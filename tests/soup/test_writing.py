"""A new weight file says what was written to it, in whatever order and stretches."""

import os

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
