"""The tables' arms: which of them are one run, and what is refused before any of them is begun."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))
import ablations


def test_arms_that_share_a_folder_are_the_same_run():
    runs = {}
    for table, arms in ablations.TABLES.items():
        for arm in arms():
            run = dataclasses.replace(arm, name="")
            assert runs.setdefault(arm.key, run) == run, table


def test_an_arm_comes_after_the_one_that_it_goes_on_from():
    for table, arms in ablations.TABLES.items():
        before = []
        for arm in arms():
            assert {arm.start, arm.earlier} <= {None, *before}, table
            before.append(arm.key)


def test_too_few_pictures_are_refused_before_any_training(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ablations.py", "losses", str(tmp_path), "--num-images", "100"])
    monkeypatch.setattr(ablations, "run_arm", lambda *_: pytest.fail("an arm was begun"))
    with pytest.raises(SystemExit):
        ablations.main()
    assert "100 pictures of each style are too few for the 320 features of 'judge'" in capsys.readouterr().err
