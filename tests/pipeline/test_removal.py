"""A merged model without a style is a folder that every tool opens."""

import stat

from helpers import copy_folder

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
