import signal
import subprocess
import sys
import time

import pytest

from dmm.errors import UserError
from dmm.files.claims import claimed

HOLD = "import sys, time\nfrom pathlib import Path\nfrom dmm.files.claims import claimed\n"
HOLD += "with claimed(Path(sys.argv[1])):\n    print('mine', flush=True)\n    time.sleep(60)\n"


def names(folder):
    return [path.name for path in folder.iterdir()]


def holding(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_second_writer_is_refused_at_once_and_told_of_the_first_one(tmp_path):
    first = holding(tmp_path / "out")
    begun = time.perf_counter()
    try:
        for path in (tmp_path / "out", tmp_path / "." / "out"):
            told = f"out' is being written by another process .process {first.pid} on "
            with pytest.raises(UserError, match=told), claimed(path):
                pass
        assert time.perf_counter() - begun < 1
        with claimed(tmp_path / "other"):
            pass
    finally:
        first.kill()
        first.wait()


def test_what_a_killed_writer_left_is_the_next_ones(tmp_path):
    killed = holding(tmp_path / "out")
    for name in (".out.0123abcd.tmp", ".out[1].0123abcd.tmp", ".other.0123abcd.tmp"):
        (tmp_path / name).mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / ".out.lock").exists()
    with claimed(tmp_path / "out"):
        assert not (tmp_path / ".out.0123abcd.tmp").exists()
    assert sorted(names(tmp_path)) == [".other.0123abcd.tmp", ".out[1].0123abcd.tmp"]


def test_a_claim_leaves_nothing_not_even_folders_that_it_needed(tmp_path):
    with claimed(tmp_path / "deep" / "er" / "out"):
        pass
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "deep" / "out"):
        (tmp_path / "deep" / "out").write_text("new")
    assert names(tmp_path / "deep") == ["out"]


def test_where_nothing_can_be_written_the_output_s_own_check_tells_it(tmp_path):
    (tmp_path / "file").write_text("")
    with claimed(tmp_path / "file" / "out"):
        pass
