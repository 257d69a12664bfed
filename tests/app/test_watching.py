"""A merge's folder is read while it is written."""

import json
import shutil

import pytest
import yaml

from dmm.app.chart import chart
from dmm.app.watching import MAX_POINTS, look_at
from dmm.errors import UserError


def line(step, **values):
    return json.dumps({"step": step, "time": 1000.0 + 2 * step, **values}) + "\n"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "merged"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"training": {"steps": 100}}))
    return folder


def test_a_run_tells_how_far_it_is_and_how_long_it_takes_yet(run):
    assert look_at(run).told == "merged: nothing is logged yet."
    lines = [line(step, score=1 / step, **{"score/ink": 2 / step, "score/photo": 3 / step}) for step in (10, 20, 30)]
    (run / "log.jsonl").write_text("".join(lines) + '{"step": 40, "sco')
    watched = look_at(run)
    assert watched.told == "merged: step 30 of 100; 2 s a step, 2 min left."
    assert watched.terms == ["score"]
    assert watched.of_term("score") == {
        "ink": [(10, 0.2), (20, 0.1), (30, 2 / 30)],
        "photo": [(10, 0.3), (20, 0.15), (30, 0.1)],
    }
    (run / "model_index.json").write_text("{}")
    assert look_at(run).told == "merged: finished."


def test_a_pause_between_two_runs_does_not_count(run):
    lines = [line(step, score=1.0) for step in range(1, 6)]
    late = [json.dumps({"step": step, "time": 9e6 + 2 * step, "score": 1.0}) + "\n" for step in range(6, 10)]
    (run / "log.jsonl").write_text("".join(lines + late))
    assert "2 s a step" in look_at(run).told


def test_styles_that_are_trained_by_themselves_have_logs_of_their_own(run):
    for i, style in enumerate(("ink", "photo")):
        (run / "training" / style).mkdir(parents=True)
        text = line(10 + i, score=0.5, **{f"score/{style}": 0.5})
        (run / "training" / style / "log.jsonl").write_text(text)
    watched = look_at(run)
    assert "step 11 of 100, style photo (2 begun)" in watched.told
    assert watched.of_term("score") == {"ink": [(10, 0.5)], "photo": [(11, 0.5)]}


def test_a_long_log_is_thinned_out_but_for_its_end(run):
    (run / "log.jsonl").write_text("".join(line(step, score=1.0) for step in range(1, 20_001)))
    (curve,) = look_at(run).of_term("score").values()
    assert len(curve) <= MAX_POINTS + 21
    assert [step for step, _ in curve[-3:]] == [19_998, 19_999, 20_000]


def test_the_newest_samples_are_shown(run):
    for step in (5, 20, 10):
        (run / "samples" / f"step-{step:08d}.png").touch()
    assert look_at(run).samples == run / "samples" / "step-00000020.png"


def test_another_folder_is_refused(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="not the folder of a merge"):
        look_at(run)


@pytest.mark.parametrize(
    "curves",
    [
        {}, {"ink": [(1, 0.5)]}, {"ink": [(1, 0.5), (2, 0.5)]}, {"ink": [(0, -1.0), (9, 2.0)], "<b>": [(3, 0.0)]},
        {"ink": [(1, 1e-9), (2, 1e6)]}, {"ink": [(1, 0.031), (2, 0.034)]},
    ],
    ids=["none", "a point", "flat", "below 0", "many powers", "few"],
)  # fmt: skip
def test_curves_are_drawn_inside_their_picture(curves):
    drawn = chart(curves)
    assert "<b>" not in drawn
    assert drawn.count("<polyline") == len(curves)
    for points in drawn.split('points="')[1:]:
        for point in points.split('"')[0].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 800
            assert 0 <= y <= 340
