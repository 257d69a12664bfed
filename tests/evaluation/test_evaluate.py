"""The protocol, on a merge that is perfect by construction."""

import functools
import json
import logging
import shutil

import pytest
from evaluation_helpers import BASE, NUM_IMAGES, PAINTING, PROMPTS, STUDENT, STYLES, TEACHERS, evaluate_in

from dmm.errors import UserError
from dmm.evaluation import held_out, painting
from dmm.evaluation.evaluate import Protocol
from dmm.evaluation.figures import NO_FID
from dmm.evaluation.score_error import score_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def run(folder):
    return functools.partial(evaluate_in, folder)


@pytest.fixture(scope="module")
def perfect(run):
    return run(STUDENT, base=BASE)


@pytest.fixture(scope="module")
def shards(folder, perfect):
    """The files of the perfect merge's pictures."""
    return sorted((folder / "pictures").iterdir())


def diagonal(matrix):
    return [row[i] for i, row in enumerate(matrix)]


def test_a_perfect_merge_is_its_reference(perfect, shards):
    assert len(shards) == 12  # two of each batch of 101 pictures
    figures = perfect.figures
    assert figures["styles"] == list(STYLES)
    assert figures["fidt_gap_percent"] == pytest.approx(0, abs=1)
    for matrix in (figures["fid_matrix"], figures["fid_reference"]):
        assert all(min(row) == row[i] for i, row in enumerate(matrix))
    assert figures["fidt"] == pytest.approx(sum(diagonal(figures["fid_matrix"])))
    assert figures["pairwise"]["psnr"]["mean"]["value"] > 45  # but for rounding
    assert figures["pairwise"]["psnr_of_other_noise"]["mean"]["value"] < 30
    assert figures["pairwise"]["feature_distance"]["mean"]["value"] < 1e-3
    assert figures["score_error"]["mean"] < 1e-6
    # with the same distribution on both sides, all of FID is bias
    assert figures["fid_bias"]["fidt_reference"] == pytest.approx(figures["fidt_reference"], rel=0.5)
    assert list(figures["kid"]["student"]["by_style"]) == list(STYLES)
    json.dumps(figures, allow_nan=False)


def test_a_teacher_as_its_own_student_gives_the_reference_exactly(run):
    figures = run(TEACHERS["ink"], {"ink": TEACHERS["ink"]}).figures
    assert figures["fid_matrix"] == figures["fid_reference"]
    assert figures["kid"]["student"] == figures["kid"]["reference"]
    assert figures["pairwise"]["feature_distance"]["mean"] == {"value": 0.0, "standard_error": 0.0}
    assert figures["score_error"] is None
    assert figures["sources"]["student"]["source"] == "baked"


def test_other_seeds_give_the_reference_within_its_noise(run):
    figures = [
        run(TEACHERS["ink"], {"ink": TEACHERS["ink"]}, Protocol(PROMPTS, NUM_IMAGES, PAINTING, seed)).figures
        for seed in (0, 1)
    ]
    assert figures[0]["fidt"] != figures[1]["fidt"]
    assert figures[0]["fidt"] == pytest.approx(figures[1]["fidt"], rel=0.5)


def test_without_fid_a_few_pictures_tell_the_rest(run, monkeypatch):
    asked = []

    def spied(*arguments, draws_per_row, **more):
        (rows,) = arguments[-1].values()
        asked.append((len(rows), draws_per_row))
        return score_error(*arguments, draws_per_row=draws_per_row, **more)

    monkeypatch.setattr(held_out, "score_error", spied)
    figures = run(STUDENT, base=BASE, protocol=Protocol(PROMPTS, 24, PAINTING, with_fid=False)).figures
    assert {figures[name] for name in NO_FID} == {None}
    assert figures["score_error"]["mean"] < 1e-6
    # both styles' latents and the style's own, drawn as often as makes a quarter of a whole evaluation's 1024
    assert set(asked) == {(32, 8), (16, 16)}
    assert figures["pairwise"]["psnr"]["mean"]["value"] > 45
    kid = figures["kid"]["student"]["mean"]
    assert abs(kid["value"]) < 4 * kid["standard_error"]
    with pytest.raises(UserError, match=r"19 pictures .* too few for KID"):
        run(STUDENT, protocol=Protocol(PROMPTS, 19, PAINTING, with_fid=False))


def test_swapped_names_show_at_once(run, perfect):
    figures = run(STUDENT, dict(zip(STYLES, reversed(TEACHERS.values()), strict=True))).figures
    assert all(min(row) != row[i] for i, row in enumerate(figures["fid_matrix"]))
    assert figures["fidt_gap_percent"] > 100
    assert figures["pairwise"]["psnr"]["mean"]["value"] < perfect.figures["pairwise"]["psnr"]["mean"]["value"] - 10


def test_what_teachers_and_base_said_is_kept_for_another_student(run, perfect, folder):
    kept = {file: file.stat().st_mtime_ns for file in (folder / "references").iterdir()}
    assert kept
    run(BASE, base=BASE)
    assert {file: file.stat().st_mtime_ns for file in (folder / "references").iterdir()} == kept


def test_the_base_scores_worse_than_a_merge(run, perfect):
    figures = run(BASE).figures
    assert figures["fidt"] > 2 * perfect.figures["fidt"]
    assert figures["kid"]["student"]["mean"]["value"] > 10 * abs(perfect.figures["kid"]["student"]["mean"]["value"])


def count_painted(monkeypatch):
    painted = []
    sample = painting.sample

    def counting(pipeline, prompts, seeds, **settings):
        painted.extend(seeds)
        return sample(pipeline, prompts, seeds, **settings)

    monkeypatch.setattr(painting, "sample", counting)
    return painted


def test_a_second_evaluation_paints_nothing_and_one_of_a_new_teacher_only_its(run, perfect, monkeypatch):
    painted = count_painted(monkeypatch)
    again = run(STUDENT, base=BASE).figures
    assert painted == []
    assert {**again, "seconds": 0} == {**perfect.figures, "seconds": 0}
    run(STUDENT, {**TEACHERS, "clay": TEACHERS["ink"]})
    assert len(painted) == 3 * NUM_IMAGES  # the student's and two batches of the teacher, under a new name


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_figures(run, perfect, tmp_path, monkeypatch):
    sample, calls = painting.sample, []

    def interrupted(*args, **settings):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return sample(*args, **settings)

    monkeypatch.setattr(painting, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_in(tmp_path, STUDENT, base=BASE)
    assert len(list((tmp_path / "pictures").iterdir())) == 4
    figures = evaluate_in(tmp_path, STUDENT, base=BASE).figures
    assert len(calls) == 5 + 12 - 4  # shards of three batches in two styles, less those that were there
    assert {**figures, "seconds": 0} == {**perfect.figures, "seconds": 0}


def test_a_damaged_picture_is_made_again(run, perfect, shards, caplog, monkeypatch):
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-5] + bytes(byte ^ 1 for byte in whole[-5:]))
    painted = count_painted(monkeypatch)
    with caplog.at_level(logging.WARNING):
        figures = run(STUDENT, base=BASE).figures
    assert "damaged" in caplog.text
    assert 0 < len(painted) <= 64
    assert shards[0].read_bytes() == whole
    assert figures["fid_matrix"] == perfect.figures["fid_matrix"]


def test_what_cannot_be_measured_is_told_in_a_sentence(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no style 'inc'; did you mean 'ink'; its styles are ink, photo, clay"):
        run(STUDENT, {"inc": TEACHERS["ink"]})
    with pytest.raises(UserError, match="12 pictures of each style are too few for the 12 features of 'pixels'"):
        evaluate_in(tmp_path, STUDENT, protocol=Protocol(PROMPTS, 12, PAINTING))
    with pytest.raises(UserError, match="Only a merged model paints mixes"):
        run(BASE, mixes=[{"ink": 0.5, "photo": 0.5}])
    with pytest.raises(UserError, match="no style 'clay'"):
        run(STUDENT, mixes=[{"ink": 0.5, "clay": 0.5}])
    usage = shutil.disk_usage(tmp_path)._replace(free=NUM_IMAGES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"MB for the pictures, and its disk has .* MB free\. Make room, ask for fewer"):
        evaluate_in(tmp_path, STUDENT)
    assert not (tmp_path / "pictures").exists()
