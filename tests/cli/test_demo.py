"""The demo merges, shows, goes on where it was, and leaves a finished one alone."""

import pytest
from PIL import Image

import dmm
from dmm.cli import main
from dmm.demo import story
from dmm.recipes.recipe import load_recipe


@pytest.fixture
def short_story(monkeypatch):
    """Two prompts and two steps; all else is as users see it."""
    monkeypatch.setattr(story, "PROMPTS", ("fox", "red apple"))
    monkeypatch.setattr(story, "DATA", {"count": 1, "steps": 1, "guidance": 2.0})
    for name in ("ADAPTERS", "PAPER"):
        method = getattr(story, name)
        short = {**method["training"], "steps": 2, "batch_size": 8, "warmup_steps": 1}
        monkeypatch.setattr(story, name, {**method, "training": short})
    monkeypatch.setattr(story, "ADAPTERS", {**story.ADAPTERS, "styles": {"rank": 16, "samples": 8}})


def test_it_merges_the_experts_with_adapters_and_leaves_a_finished_demo_alone(short_story, tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--output", str(folder)]) == 0
    assert f"Wrote {folder / 'demo.png'}" in capsys.readouterr().out
    with Image.open(folder / "demo.png") as picture:
        width, height = picture.size
    assert width > 8 * 128  # a column for every expert
    assert height > 4 * 128  # two rows for every prompt
    names = dmm.style_names(dmm.load_pipeline(folder / "merged"))
    assert names == story.styles() == [teacher.name for teacher in load_recipe(folder / "recipe.yaml").teachers]
    assert len(names) == 8
    assert load_recipe(folder / "recipe.yaml").styles.rank == 16
    before = (folder / "demo.png").stat().st_mtime_ns
    assert main(["demo", "--output", str(folder)]) == 0
    assert "there already" in capsys.readouterr().out
    assert (folder / "demo.png").stat().st_mtime_ns == before


def test_an_interrupted_demo_goes_on(short_story, tmp_path, capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(story, "merge_experts", interrupted)
        assert main(["demo", "--output", str(folder)]) == 130
    assert "run dmm demo again to go on" in capsys.readouterr().err
    merged = []
    monkeypatch.setattr(story, "merge_experts", lambda folder: merged.append(folder))
    monkeypatch.setattr(
        story, "show", lambda folder, progress, family: story.Show(folder, 1, story.Verdict(1, 1), story.Verdict(1, 1))
    )
    assert main(["demo", "--output", str(folder)]) == 0
    assert merged == [folder]


def test_another_folder_is_not_written_into(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_papers_merge_is_there_for_the_asking(short_story, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story, "merge_experts", lambda folder: None)
    monkeypatch.setattr(
        story, "show", lambda folder, progress, family: story.Show(folder, 1, story.Verdict(1, 1), story.Verdict(1, 1))
    )
    assert main(["demo", "--paper"]) == 0
    recipe = load_recipe(tmp_path / "dmm-demo-paper" / "recipe.yaml")
    assert (recipe.styles.rank, recipe.styles.trained, recipe.start) == (0, "all", "average")


def test_the_demos_merges_are_short_enough_for_two_cores():
    trainings = story.ADAPTERS["training"], story.PAPER["training"]
    samples = [training["steps"] * training["batch_size"] for training in trainings]
    assert samples[0] * 4 <= 9_000  # of the four experts that are no LoRAs
    assert samples[1] <= 40_000
    assert story.DATA["count"] * 8 * story.DATA["steps"] <= 10_000


def test_another_familys_experts_are_merged_for_the_asking(short_story, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story, "merge_experts", lambda folder: None)
    monkeypatch.setattr(
        story, "show", lambda folder, progress, family: story.Show(folder, 1, story.Verdict(1, 1), story.Verdict(1, 1))
    )
    assert main(["demo", "--family", "sdxl"]) == 0
    recipe = load_recipe(tmp_path / "dmm-demo-sdxl" / "recipe.yaml")
    assert [teacher.name for teacher in recipe.teachers] == ["noto", "openmoji"]
    assert [bool(teacher.all_loras) for teacher in recipe.teachers] == [False, True]
    assert "Merging 2 experts" in capsys.readouterr().out
