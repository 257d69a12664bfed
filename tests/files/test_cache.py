import pytest

from dmm.errors import UserError
from dmm.files.cache import cache_folder


def test_a_cache_that_cannot_be_written_says_how_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder("pictures") == tmp_path / "cache" / "dmm" / "pictures"
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="Set XDG_CACHE_HOME to a folder that can"):
        cache_folder("pictures")


def test_a_read_only_cache_is_told_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as for anybody but root
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cache_folder("pictures")
