"""A merged model without a style is a folder that every tool opens."""

import errno
import math
import os
import shutil
import stat

import pytest
from helpers import copy_folder
from safetensors.torch import load_file, save_file

from dmm.errors import UserError
from dmm.pipeline.removal import remove_style


def test_what_an_older_version_wrote_is_completed(merged, tmp_path):
    older = copy_folder(merged, tmp_path / "older")
    for name in ("vocab.json", "merges.txt"):
        (older / "tokenizer" / name).unlink()
    (older / "unet/diffusion_pytorch_model.safetensors").chmod(0o600)
    assert remove_style(older, "ink", tmp_path / "out") == ["photo", "clay"]
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out/tokenizer" / name).read_bytes() == (merged / "tokenizer" / name).read_bytes()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    (tmp_path / "usual").touch()
    assert modes == {stat.S_IMODE((tmp_path / "usual").stat().st_mode)}


def test_nothing_is_copied_that_is_not_known(merged, tmp_path):
    model = copy_folder(merged, tmp_path / "model")
    (model / "scheduler" / "evil.py").write_text("raise SystemExit")
    (model / "unet" / "loop").symlink_to("loop")
    (model / "vae" / "up").symlink_to("..")
    (model / "text_encoder" / "notes").mkdir()
    os.mkfifo(model / "unet" / "pipe")
    remove_style(model, "ink", tmp_path / "out")
    plain = tmp_path / "plain"
    remove_style(merged, "ink", plain)
    names = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert names == {path.relative_to(plain) for path in plain.rglob("*")}


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "styles"])
def test_what_is_copied_is_finite(merged, tmp_path, component):
    model = copy_folder(merged, tmp_path / "model")
    (file,) = (model / component).glob("*.safetensors")
    tensors = load_file(file)
    name, tensor = next((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    tensor.view(-1)[0] = math.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"1 of the .* values of '{name}' are NaN or infinite"):
        remove_style(model, "ink", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("after", [1, 5, 9, 12])
def test_a_full_disk_is_one_sentence(merged, tmp_path, monkeypatch, after):
    copied = []
    copyfile = shutil.copyfile

    def fill(source, target):
        copied.append(target)
        if len(copied) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copyfile(source, target)

    monkeypatch.setattr("shutil.copyfile", fill)
    with pytest.raises(UserError, match="out' could not be written: No space left on device"):
        remove_style(merged, "ink", tmp_path / "out")
    assert not list(tmp_path.iterdir())
