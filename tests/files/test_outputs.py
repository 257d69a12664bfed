import errno
import os
import stat

import pytest

from dmm.errors import UserError
from dmm.files import swap
from dmm.files.outputs import check_file, check_folder, check_new_folder, new_file, new_files, new_folder


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


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(swap, "_exchange", lambda *_: False)
    place = tmp_path / "out"
    for name in ("unet/1", "unet/2", "styles/a", "index", "notes/mine", "mine"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("old")
    (place / "link").symlink_to("mine")
    with new_folder(place, overwrite=True, parts=["styles", "index"]) as building:
        (building / "unet").mkdir()
        (building / "unet" / "1").write_text("new")
        (building / "index").write_text("new")
        assert set(contents(place).values()) == {"old"}
    assert contents(place) == {"unet/1": "new", "index": "new", "notes/mine": "old", "mine": "old", "link": "old"}
    assert (place / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kill_at", ["the first rename", "the second rename", "the removal of the old one"])
def test_who_is_killed_while_folders_are_swapped_leaves_the_one_or_the_other(tmp_path, monkeypatch, kill_at):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    place, new = tmp_path / "out", tmp_path / ".out.01234567.tmp"
    for folder, text in ((place, "old"), (new, "new")):
        folder.mkdir()
        (folder / "a").write_text(text)
    with monkeypatch.context() as patched:
        patched.setattr(swap, "_exchange", lambda *_: False)
        if kill_at == "the removal of the old one":
            patched.setattr(swap.shutil, "rmtree", killed)
        else:
            doomed = place if kill_at == "the first rename" else new
            rename = type(place).rename
            patched.setattr(type(place), "rename", lambda a, b: killed() if a == doomed else rename(a, b))
        with pytest.raises(Killed):
            swap.swap_in(new, place)
    check_folder(place, overwrite=True)  # as the next writer does
    assert (place / "a").read_text() == ("new" if kill_at == "the removal of the old one" else "old")
    assert not list(tmp_path.glob("*.old"))


def test_names_without_room_for_a_temporary_one_are_refused_before_work(tmp_path):
    for check, suffix in ((check_file, ".png"), (check_folder, "")):
        check(tmp_path / ("n" * (241 - len(suffix)) + suffix))
        with pytest.raises(UserError, match="is 1 bytes too long"):
            check(tmp_path / ("n" * (242 - len(suffix)) + suffix))
        with pytest.raises(UserError, match="is 2 bytes too long"):
            check(tmp_path / ("é" * 120 + "nnn" + suffix.replace(".png", "")))
    with new_file(tmp_path / ("n" * 241)) as temporary:
        temporary.write_text("it is long enough")


def test_links_in_a_circle_and_the_folder_that_one_is_in_are_sentences(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="is a file"):
        check_new_folder(tmp_path / "loop")
    with pytest.raises(UserError, match="cannot be written"):
        check_file(tmp_path / "loop" / "out.png")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, type(tmp_path)()):
        with pytest.raises(UserError, match="is where this command runs"):
            check_new_folder(path, overwrite=True)
    with pytest.raises(UserError, match="is where a disk is mounted"):
        check_new_folder(type(tmp_path)("/proc"), overwrite=True)


def test_pictures_join_those_in_a_folder(tmp_path):
    folder = tmp_path / "pictures"
    for overwrite, text in ((False, "1"), (True, "2")):
        with new_files(folder, overwrite=overwrite) as building:
            (building / "a.png").write_text(text)
            (building / f"{text}.png").write_text(text)
    assert contents(folder) == {"a.png": "2", "1.png": "1", "2.png": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
