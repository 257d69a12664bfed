import errno
import os
import signal

import pytest

import dmm.pipeline.removal
import dmm.pipeline.styled
import dmm.soup.make
from dmm.cli import main

WRITERS = {
    "export": (dmm.pipeline.styled, "complete_folder"),
    "soup": (dmm.soup.make, "write"),
    "remove": (dmm.pipeline.removal, "write_side_car"),
}
"""What each command calls once its output is half written."""
WHOLE = {command: getattr(module, name) for command, (module, name) in WRITERS.items()}


@pytest.fixture
def commands(merged, sd1_file, tmp_path, monkeypatch):
    """A merged model's commands that write, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path / "cache")
    (tmp_path / "recipe.yaml").write_text(f"method: soup\nteachers:\n  - {{name: a, model: {sd1_file}}}\n")
    return {
        "export": ["export", merged, "--style", "ink"],
        "soup": ["soup", "recipe.yaml", "--set", f"config={merged}"],
        "remove": ["remove", merged, "ink"],
    }


def interrupting(monkeypatch, command, act):
    """Let ``act`` happen while a command's output is half written."""
    module, name = WRITERS[command]
    whole = WHOLE[command]

    def half(*args, **kwargs):
        act()
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, name, half)


@pytest.mark.parametrize("command", ["export", "soup", "remove"])
def test_what_is_terminated_leaves_nothing(commands, tmp_path, monkeypatch, capsys, command):
    before = signal.getsignal(signal.SIGTERM)

    def terminate():
        assert len(list(tmp_path.glob(".out*"))) == 2, "the lock, and what is half written"
        os.kill(os.getpid(), signal.SIGTERM)

    interrupting(monkeypatch, command, terminate)
    assert main([*map(str, commands[command]), "--output", "deep/../out"]) == 143
    assert capsys.readouterr().err.splitlines()[-1].startswith("dmm: terminated")
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".out*"))
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("command", ["export", "soup", "remove"])
def test_a_second_writer_of_one_output_is_refused(commands, tmp_path, monkeypatch, capsys, command):
    told = []

    def a_second_one():
        assert main([*map(str, commands["export"]), "--output", "out"]) == 2
        told.append(capsys.readouterr().err)

    # flock is of an open file: a second one of the same process waits as another process does
    interrupting(monkeypatch, command, a_second_one)
    assert main([*map(str, commands[command]), "--output", "out"]) == 0
    assert f"'out' is being written by another process (process {os.getpid()} on" in told[0]
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("command", ["export", "soup", "remove"])
def test_what_overwrites_replaces_the_old_model_whole(commands, tmp_path, monkeypatch, capsys, command):
    for name in ("styles/gone", "unet/gone", "unet/config.json", "model.safetensors", "mine", "notes/mine"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("old")
    interrupting(monkeypatch, command, lambda: os.kill(os.getpid(), signal.SIGINT))
    args = [*map(str, commands[command]), "--overwrite", "--output", "out"]
    assert main(args) == 130
    assert {file.read_text() for file in (tmp_path / "out").rglob("*") if file.is_file()} == {"old"}
    interrupting(monkeypatch, command, lambda: None)
    assert main(args) == 0
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.name for file in files if file.read_bytes() == b"old"} == {"mine"}
    assert (tmp_path / "out" / "notes" / "mine").is_file()


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied"), (errno.ELOOP, "Too many levels")],
)
def test_what_the_system_refuses_is_a_sentence(commands, monkeypatch, capsys, number, told):
    def refused(*_):
        raise OSError(number, os.strerror(number), "a/file")

    monkeypatch.setattr("dmm.soup.recipe.load_soup_recipe", refused)
    assert main([*map(str, commands["soup"]), "--output", "out"]) == 2
    assert capsys.readouterr().err.startswith(f"dmm: error: 'a/file': {told}")


def test_what_is_our_own_fault_keeps_its_traceback(commands, monkeypatch):
    def wrong(*_):
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr("dmm.soup.recipe.load_soup_recipe", wrong)
    with pytest.raises(FileNotFoundError):
        main([*map(str, commands["soup"]), "--output", "out"])
