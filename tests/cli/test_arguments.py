import argparse

import pytest

from dmm.cli.arguments import MAX_SEED, read_seeds, write_seeds
from dmm.errors import UserError
from dmm.files.prompts import read_prompts


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("1,2,5", [1, 2, 5]), ("8, 0-2", [8, 0, 1, 2]), (str(MAX_SEED), [MAX_SEED])],
)
def test_seeds_are_read_and_written_back(text, seeds):
    assert read_seeds(text) == seeds
    assert read_seeds(write_seeds(seeds)) == seeds


@pytest.mark.parametrize("text", ["", "-1", "3-1", "1,", "a", "1.5", "1,1", "0-3,2", str(MAX_SEED + 1), "0-4000000000"])
def test_what_is_no_list_of_seeds_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        read_seeds(text)


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat, sitting\r\n\r\n  ein Käfer \n".encode())
    assert read_prompts(path) == ["a cat, sitting", "ein Käfer"]


@pytest.mark.parametrize(("content", "message"), [(b"\n \n", "is empty"), (b"\xff\xfe\x00", "not UTF-8")])
def test_files_without_prompts_are_refused(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(path)
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
