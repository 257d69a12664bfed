"""Four tiny SD 1.x as single files and as folders: a base, and three that differ from it everywhere."""

import pytest
import torch
from conftest import tiny_pipeline

from dmm.formats.single_file import save_single_file
from dmm.soup.reading import Digests

__all__ = ["digests", "models", "own_cache"]

NAMES = ("base", "a", "b", "c")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with ``a.safetensors`` (half precision) and ``a/`` (float32), and so on; read only."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(NAMES):
        pipe = tiny_pipeline(seed)
        save_single_file(pipe, folder / f"{name}.safetensors", dtype=torch.float16)
        pipe.save_pretrained(folder / name)
    return folder


@pytest.fixture
def digests(tmp_path):
    return Digests(tmp_path / "cache" / "digests.json")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path / "cache")
