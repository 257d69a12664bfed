"""Merges of more and more hands: whom each cell has, how long it is trained, and what its row says."""

import json
import sys
from pathlib import Path

import pytest

from dmm.demo import story
from dmm.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))
import scaling
from treatments import ALL_STYLES, TREATED_STYLES


@pytest.fixture
def work(tmp_path):
    (tmp_path / "treated").mkdir()
    for name in TREATED_STYLES:
        (tmp_path / "treated" / f"{name}.safetensors").touch()
    return tmp_path


@pytest.mark.parametrize("count", scaling.COUNTS)
def test_a_merge_has_the_first_hands_and_as_many_samples_of_each(work, count):
    recipe = scaling.recipe_of(work, f"{count}-prompts", samples=400)
    names = [one["name"] for one in recipe["teachers"]]
    assert sorted(names) == sorted([*story.styles(), *ALL_STYLES[8:]][:count])
    assert recipe["training"]["steps"] * recipe["training"]["batch_size"] == 400 * count


def test_adapters_are_not_trained_and_prompts_have_none(work):
    assert scaling.recipe_of(work, "8-adapters", 400)["styles"] == {"rank": 16, "train": "none"}
    assert scaling.recipe_of(work, "8-prompts", 400)["styles"] == {"rank": 0}


def test_a_missing_lora_is_named_before_any_merge(tmp_path):
    with pytest.raises(UserError, match=r"noto-sepia\.safetensors' is missing: make it with train_treated\.py"):
        scaling.teachers_of(tmp_path, 16)


def test_a_row_counts_where_the_own_teacher_is_nearest(tmp_path, capsys):
    folder = tmp_path / "4-adapters"
    (folder / "merged" / "styles").mkdir(parents=True)
    (folder / "merged" / "styles" / "a").write_bytes(bytes(8000))
    names = ["a", "b", "c", "d"]
    matrix = [[1.0, 5, 5, 5], [2, 3.0, 5, 5], [5, 5, 2.0, 5], [5, 5, 5, 2.0]]
    report = {
        "styles": names,
        "fid_matrix": matrix,
        "score_error": {"own": {"by_style": dict.fromkeys(names, 0.25)}},
        "judged": {"style": {"student": dict.fromkeys(names, 90.0), "teacher": dict.fromkeys(names, 95.0)}},
    }
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text(json.dumps(report))
    (folder / "seconds.json").write_text('{"merge": 7.0}')
    scaling.print_tables(tmp_path)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4, adapters"))
    assert row == "| 4, adapters | 2.00 | 2.00 | 3 of 4 | 90.0 | 95.0 | 0.250 | 0.250 | 2 | 7 |"


def test_a_look_counts_the_hands_that_are_taken_for_themselves(tmp_path):
    folder = tmp_path / "4-adapters"
    (folder / "merged" / "styles").mkdir(parents=True)
    (folder / "seconds.json").write_text('{"merge": 7.0}')

    def of(own, other):
        who = {"taken_for": {"a": own, "b": other}, "thing": 0.5}
        return {"teacher": who, "student": who, "psnr": 20.0}

    (folder / "look.json").write_text(json.dumps({"a": of(0.75, 0.25), "b": of(0.75, 0.25)}))
    row = scaling.looked_at(tmp_path, "4-adapters")
    assert (row["right hand, %"], row["most often taken for itself"]) == ("50.0", "1 of 2")
    assert (row["right thing, %"], row["PSNR to the teacher, dB"]) == ("50.0", "20.00")
