"""The demo tells its story once, and leaves a finished one alone."""

import pytest
from PIL import Image

from dmm.cli import main
from dmm.demo import story


@pytest.fixture
def short_story(monkeypatch):
    monkeypatch.setattr(story, "PROMPTS", ("fox", "red apple"))


def test_it_paints_base_and_experts_and_leaves_a_finished_demo_alone(short_story, tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--output", str(folder)]) == 0
    assert f"Wrote {folder / 'experts.png'}" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["experts.png"]
    with Image.open(folder / "experts.png") as picture:
        width, height = picture.size
    assert width > 9 * 128  # base and eight experts across
    assert height > 2 * 128
    before = (folder / "experts.png").stat().st_mtime_ns
    assert main(["demo", "--output", str(folder)]) == 0
    assert "there already" in capsys.readouterr().out
    assert (folder / "experts.png").stat().st_mtime_ns == before


def test_another_folder_is_not_written_into(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_demo_leaves_nothing(short_story, tmp_path, capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "sample", interrupted)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
