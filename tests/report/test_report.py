"""A report's folder, from an evaluation; reports side by side."""

import copy
import json
import re

import pytest
import torch
from PIL import Image

from dmm.cli import main
from dmm.errors import UserError
from dmm.evaluation.evaluate import Evaluation
from dmm.evaluation.figures import NO_FID
from dmm.report.compare import compare_reports, write_table
from dmm.report.files import read_report
from dmm.report.page import _grid
from dmm.report.report import write_report
from dmm.report.verdict import verdict

STYLES = ["ink", "photo <b>"]


def estimates(value, error):
    one = {"value": value, "standard_error": error}
    return {"mean": one, "by_style": dict.fromkeys(STYLES, one)}


def judged(difference):
    rates = dict.fromkeys(STYLES, 90.0)
    return {
        "student": rates,
        "teacher": rates,
        "difference": dict.fromkeys(STYLES, difference),
        "mean_difference": difference,
        "interval": [difference - 1, difference + 0.5],
        "worst": difference,
    }


def figures_of(fidt=2.0, kid=0.1):
    by_style, by_band = dict.fromkeys(STYLES, 0.2), {s: [0.1, 0.3] for s in STYLES}
    errors = {
        "mean": 0.2,
        "by_style": by_style,
        "bands": [[0, 500], [500, 1000]],
        "curve": [0.1, 0.3],
        "by_band": by_band,
    }
    return {
        "styles": STYLES,
        "num_images": 1000,
        "extractor": "judge",
        "fid_matrix": [[fidt / 2, 20.0], [30.0, fidt / 2]],
        "fid_reference": [[0.5, 21.0], [31.0, 0.5]],
        "fidt": fidt,
        "fidt_reference": 1.0,
        "fidt_gap_percent": 100 * (fidt - 1),
        "fid_bias": {"fidt": 0.5, "fidt_reference": 0.6},
        "kid": {"student": estimates(kid, 0.01), "reference": estimates(0.0, 0.01)},
        "score_error": {**errors, "own": errors},
        "pairwise": {
            name: estimates(20.0, 0.1)
            for name in ("feature_distance", "feature_distance_of_other_noise", "psnr", "psnr_of_other_noise")
        },
        "judged": {what: judged(-1.5) for what in ("style", "concept", "both")},
        "mixing": {"ink=0.5,photo=0.5": {"clip": {w: {"value": 3.0, "standard_error": 0.1} for w in MIXED}}},
        "settings": {"steps": 25, "guidance_scale": 7.0, "negative_prompt": ""},
        "sources": {
            "student": {"source": "merged", "sha256": "ab" * 32},
            "base": None,
            "teachers": {style: {"source": f"models/{style}", "sha256": "cd" * 32} for style in STYLES},
            "extractor": "ef" * 16,
        },
        "versions": {"dmm": "0.1.0"},
        "seconds": 12.5,
    }


def quick_figures(kid=0.1):
    """Of an evaluation without FID and judge."""
    return {**figures_of(kid=kid), **NO_FID, "num_images": 64, "judged": None}


MIXED = ("student", "weighted_merge", "difference")


@pytest.fixture
def evaluation():
    pictures = {style: [torch.full((3, 16, 16), 40 * i, dtype=torch.uint8) for i in range(2)] for style in STYLES}
    return Evaluation(figures_of(), ["a cat", "a dog"], pictures, pictures)


@pytest.fixture
def folder(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "report")
    return tmp_path / "report"


def test_a_report_is_figures_pictures_and_a_page(folder):
    names = ["fid_matrix.png", "grid.png", "report.html", "report.json", "score_error.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert read_report(folder) == figures_of()
    for name in ("fid_matrix.png", "grid.png", "score_error.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("RGB").get_flattened_data())) > 2


@pytest.mark.parametrize(
    ("points", "words"),
    [(-1.5, "merged paints as its teachers do: 90 of 100"), (-4, "nearly as its teachers do"), (-40, "does not yet")],
)
def test_the_verdict_goes_by_the_judge(points, words):
    told = verdict({**figures_of(), "judged": {"both": judged(points)}})
    assert words in told
    assert told.endswith(".")


def test_the_verdict_without_a_judge_goes_by_fid_and_names_the_weakest_style():
    figures = {**figures_of(fidt=2.0), "judged": None}
    figures["fid_matrix"][1][1] = 3.0
    told = verdict(figures)
    assert told.startswith("merged paints nearly as its teachers do: its pictures are 2 times as far")
    assert "furthest behind is photo <b>" in told


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.1, "paints as its teachers do: its predictions are 0.10 as far"), (0.28, "nearly as"), (0.39, "falls behind")],
)
def test_the_verdict_without_judge_and_fid_goes_by_the_score_error(error, words):
    assert words in verdict({**quick_figures(), "score_error": {"mean": error, "by_style": {"ink": 1.0, "photo": 0.0}}})


def test_the_verdict_by_kid_alone_says_only_whether_a_difference_is_seen():
    alone = {**quick_figures(), "score_error": None}
    assert verdict(alone).startswith("merged does not paint as its teachers do: 64 pictures of each style show it")
    alone["kid"] = {"student": estimates(0.02, 0.01)}
    assert verdict(alone).startswith("merged cannot be told from its teachers by 64 pictures of each style")


def test_a_style_that_the_judge_does_not_know_takes_nothing_from_the_others():
    one = {**judged(-3), **{key: {"ink": 90.0} for key in ("student", "teacher")}, "difference": {"ink": -3.0}}
    assert "(1 of its styles the judge does not know)" in verdict({**figures_of(), "judged": {"both": one}})


def test_the_page_begins_with_the_verdict_and_the_models_name(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>merged" in page
    assert page.index("merged paints as its teachers do") < page.index("FIDt")
    # of two styles at their sizes: twice as wide is enough, and no page's width
    with Image.open(folder / "grid.png") as grid:
        assert f'style="--most:{2 * grid.width}px"' in page
    assert '<figure class="wide">' not in page


@pytest.mark.parametrize(("width", "kind"), [(300, "<figure>"), (576, "<figure>"), (577, '<figure class="wide">')])
def test_a_grid_is_as_wide_as_the_page_where_it_has_the_pixels(tmp_path, width, kind):
    Image.new("RGB", (width, 100)).save(tmp_path / "grid.png")
    assert _grid(tmp_path / "grid.png", "").startswith(kind)


def test_the_page_needs_nothing_beside_it(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "photo &lt;b&gt;" in page
    assert "<b>ink" not in page.replace("photo &lt;b&gt;", "")
    for told in ("FIDt", "-1.5 <small>points", "weighted merging", "about 0.5"):
        assert told in page


def test_a_report_without_what_cannot_be_measured(evaluation, tmp_path):
    evaluation.figures.update(score_error=None, judged=None, mixing=None)
    write_report(evaluation, tmp_path / "report")
    assert not (tmp_path / "report" / "score_error.png").exists()
    assert "Score error" not in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_a_quick_report_says_that_it_has_no_fid_and_has_all_else(evaluation, tmp_path):
    evaluation.figures.update(quick_figures())
    write_report(evaluation, tmp_path / "report")
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["grid.png", "report.html", "report.json", "score_error.png"]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "merged paints nearly as its teachers do" in page
    assert "A quick evaluation has no FID" in page
    for left_out in ("FIDt", "FID matrix", "<th>FID</th>"):
        assert left_out not in page
    assert page.index("Teacher over student") < page.index("<th>KID &times; 1000</th>")


def test_quick_reports_are_compared_without_fid_and_not_with_others():
    compared = compare_reports([("a", quick_figures(0.1)), ("b", quick_figures(0.3))])
    assert compared["KID"]["b"].value == 0.3
    assert "FIDt" not in compared
    with pytest.raises(UserError, match="num_images is 64 of the one, and 1000 of the other"):
        compare_reports([("a", quick_figures()), ("b", figures_of())])


def test_a_report_is_not_written_over_another(evaluation, folder):
    with pytest.raises(UserError, match="not empty"):
        write_report(evaluation, folder)
    write_report(evaluation, folder, overwrite=True)


def test_reports_alone_have_their_own_error_bars():
    compared = compare_reports([("a", figures_of(2.0, 0.1)), ("b", figures_of(4.0, 0.3))])
    assert compared["FIDt"]["b"].value == 4
    assert compared["FIDt"]["b"].above == 0
    assert (compared["KID"]["a"].value, compared["KID"]["a"].below) == (0.1, pytest.approx(0.01))
    points = compared["right style and thing, points"]["a"]
    assert (points.value, points.below, points.above) == (-1.5, pytest.approx(1), pytest.approx(0.5))
    table = write_table(compared)
    assert "| a | 2.00 | 100.0 | 0.10000 ± 0.01000 |" in table
    assert "-1.50 (-2.50 to -1.00)" in table


def test_runs_of_one_name_become_their_mean():
    compared = compare_reports([("a", figures_of(fidt)) for fidt in (2.0, 3.0, 4.0)] + [("b", figures_of(9.0))])
    assert compared["FIDt"]["a"].value == 3
    assert compared["FIDt"]["a"].above == pytest.approx(3**-0.5)  # a standard deviation of 1, three runs
    assert list(compared["FIDt"]) == ["a", "b"]


def test_what_only_some_have_is_left_out():
    without = {**figures_of(), "score_error": None}
    assert "score error" not in compare_reports([("a", figures_of()), ("b", without)])


@pytest.mark.parametrize(("key", "value"), [("num_images", 500), ("extractor", "clip"), ("styles", ["ink"])])
def test_what_cannot_be_compared_is_refused(key, value):
    with pytest.raises(UserError, match=f"'a' and 'b' cannot be compared: {key} is"):
        compare_reports([("a", figures_of()), ("b", {**figures_of(), key: value})])


def test_other_settings_are_refused():
    other = copy.deepcopy(figures_of())
    other["settings"]["steps"] = 10
    with pytest.raises(UserError, match="steps is 25 of the one, and 10 of the other"):
        compare_reports([("a", figures_of()), ("b", other)])


def test_the_command_writes_a_table_and_a_plot(folder, tmp_path, capsys):
    output = tmp_path / "comparison"
    assert main(["compare", str(folder), f"again={folder}", "--output", str(output)]) == 0
    assert "| report | 2.00 |" in capsys.readouterr().out
    assert "| again | 2.00 |" in (output / "comparison.md").read_text(encoding="utf-8")
    with Image.open(output / "comparison.png") as picture:
        assert min(picture.size) > 300
    assert main(["compare", str(folder), "--output", str(tmp_path / "one")]) == 2
    assert "two reports or more" in capsys.readouterr().err


def test_what_is_no_report_is_told(tmp_path):
    with pytest.raises(UserError, match=r"is no report: .* could not be read: No such file"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"styles": []}))
    with pytest.raises(UserError, match="has no 'num_images'"):
        read_report(tmp_path)
