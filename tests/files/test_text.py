import json
import os
from pathlib import Path

import pytest

from dmm.errors import UserError, one_line
from dmm.files.json import parse_json, read_json
from dmm.files.prompts import read_prompts, web_ui_syntax
from dmm.files.text import read_text


def test_prompts_end_where_lines_end_and_nowhere_else(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa red\u2028apple\r\na\x0bhouse\u0085\n\n  three\x1cfour\rfive \x0c\n".encode())
    assert read_prompts(file) == ["a red\u2028apple", "a\x0bhouse", "three\x1cfour", "five"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_text, read_prompts):
        with pytest.raises(UserError, match="is a pipe, a socket or a device"):
            read(tmp_path / "pipe")
    with pytest.raises(UserError, match="no such file"):  # a config's place is looked at first
        read_json(tmp_path / "pipe")


def test_what_a_shell_pipes_in_is_read():
    receiver, sender = os.pipe()
    os.write(sender, b"a fox\n")
    os.close(sender)
    assert read_prompts(Path(f"/dev/fd/{receiver}")) == ["a fox"]
    os.close(receiver)


def test_links_in_a_circle_bytes_that_are_no_text_and_too_many_are_sentences(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "long").write_text("x" * 11)
    for name, message in (("loop", "symbolic links"), ("latin", "not UTF-8"), ("long", "more than 10 bytes")):
        with pytest.raises(UserError, match=message):
            read_text(tmp_path / name, largest=10)
    assert read_text(tmp_path / "long", largest=11) == "x" * 11


@pytest.mark.parametrize("text", ['{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "[" * 101 + "]" * 101])
def test_json_nested_beyond_all_use_is_a_sentence(text):
    with pytest.raises(UserError, match=r"^it is nested more than 100 levels deep"):
        parse_json(text, "it")


def test_json_of_a_hundred_levels_is_read():
    value = json.loads("[" * 100 + "]" * 100)
    assert parse_json("[" * 100 + "]" * 100, "it") == value


@pytest.mark.parametrize("text", ["{", '{"a": tru}', "", b"\xff\xfe\x00", "9" * 5000])
def test_what_is_no_json_is_a_sentence(text):
    with pytest.raises(UserError, match=r"^it is not valid JSON: "):
        parse_json(text, "it")


def test_what_an_error_quotes_stays_within_its_line():
    assert one_line("a\nb\r\x1b[31mc\u2028d\ud800") == "a b \\x1b[31mc d\\ud800"
    assert str(UserError("there is no style 'x\ny'.")) == "there is no style 'x y'."
    assert one_line("schön 猫") == "schön 猫"
    assert len(str(UserError("x" * 10**6))) < 2100


def test_what_web_uis_read_in_prompts_is_found():
    prompts = ["a (red:1.2) cat", "((cat)), [fox:owl:0.5]", "<lora:ink:0.8> a BREAK b", "a (small) cat: 1.5 kg [sic]"]
    found = ["(red:1.2)", "((cat))", "[fox:owl:0.5]", "<lora:ink:0.8>", "BREAK"]
    assert web_ui_syntax([*prompts, *prompts]) == found
