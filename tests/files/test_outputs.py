import errno
import os
import stat

import pytest

from dmm.errors import UserError
from dmm.files.outputs import check_file, check_folder, new_file, new_folder


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "deep" / "out.txt"
    with new_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_and_the_old_file_as_it_was(tmp_path, failure):
    old = tmp_path / "old.txt"
    old.write_text("old")
    for path in (old, tmp_path / "new.txt"):
        with pytest.raises(failure), new_file(path, overwrite=True) as temporary:
            temporary.write_text("half")
            raise failure
    with pytest.raises(failure), new_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("half")
        raise failure
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "old"


def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "out.txt"
    with pytest.raises(UserError, match="exists"), new_file(path) as temporary:
        temporary.write_text("new")
        path.write_text("theirs")
    assert path.read_text() == "theirs"


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("there", [False, True])
def test_files_of_a_folder_have_the_mode_that_the_umask_says(tmp_path, umask, mode, there):
    folder = tmp_path / "out"
    before = os.umask(umask)
    try:
        if there:
            folder.mkdir()
            (folder / "a").touch(0o600)
        with new_folder(folder, overwrite=True) as temporary:
            (temporary / "sub").mkdir()
            for name in ("a", "sub/b"):
                (temporary / name).touch(0o600)  # as a library that writes private files does
            (temporary / "c").write_text("")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in ("a", "sub/b", "c")} == {mode}


def test_a_folder_is_filled_whole_and_keeps_what_is_not_replaced(tmp_path):
    folder = tmp_path / "out"
    with new_folder(folder) as temporary:
        (temporary / "a").write_text("1")
        assert not folder.exists()
    (folder / "mine").write_text("mine")
    with pytest.raises(UserError, match="not empty"), new_folder(folder):
        pass
    with new_folder(folder, overwrite=True) as temporary:
        (temporary / "a").write_text("2")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("3")
    assert {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()} == {
        "a": "2",
        "mine": "mine",
        "sub/b": "3",
    }
    assert list(tmp_path.iterdir()) == [folder]


def test_an_empty_folder_may_be_filled(tmp_path):
    with new_folder(tmp_path) as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "a").read_text() == "1"


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "out.txt", tmp_path / ("x" * 300)):
        with pytest.raises(UserError):
            check_file(path)
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "file")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="not writable"):
            check_file(tmp_path / "locked" / "out.txt")


def test_a_full_disk_is_told_in_a_sentence_and_other_errors_are_not_ours(tmp_path):
    with pytest.raises(UserError, match="could not be written: No space left"), new_file(tmp_path / "out.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "out.txt"):
        raise FileNotFoundError(errno.ENOENT, "the model's file vanished")


def test_outputs_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    with new_file(tmp_path / "out.txt") as temporary:
        temporary.write_text("")
    assert (tmp_path / "out.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode
