"""The tables' arms: which of them are one run, and what is refused before any of them is begun."""

import dataclasses
import json
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


def test_growth_is_told_beside_the_spread_of_seeds(capsys, tmp_path):
    two, one = ablations.TABLES["longer"]()[:2]
    for arm, fids in ((two, [3.0, 3.2]), (one, [3.5, 3.3])):
        for seed, fid in enumerate(fids):
            report = {"styles": ["ink"], "fid_matrix": [[fid]], "score_error": {"by_style": {"ink": fid}}}
            folder = ablations.folder_of(tmp_path, arm.key, seed) / "report"
            folder.mkdir(parents=True)
            (folder / "report.json").write_text(json.dumps(report))
    ablations.print_growth(one, two, ["ink"], tmp_path, [0, 1])
    # standard deviations of 0.141 each: twice that, and twice its diagonal
    assert capsys.readouterr().out.splitlines()[-1] == "| ink | +0.30 | 0.28 | 0.40 | 1.10 times |"
