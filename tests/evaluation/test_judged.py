"""Rates and their differences, pair by pair."""

import pytest
import torch

from dmm.evaluation.judged import compare, judge_pictures


def rights(*counts):
    """1000 pairs of student and teacher: both right, student only, teacher only, neither."""
    both, student, teacher = counts
    said = torch.zeros(2, 1000, dtype=torch.bool)
    said[:, :both] = True
    said[0, both : both + student] = True
    said[1, both + student : both + student + teacher] = True
    return said


def test_who_is_right_on_the_same_pictures_does_not_differ():
    one = {"ink": rights(900, 0, 0)[0]}
    found = compare(one, one)
    assert found.difference == {"ink": 0}
    assert found.interval == (0, 0)
    assert found.student == found.teacher == {"ink": 90}


def test_the_interval_is_that_of_pairs():
    said = {"ink": rights(900, 20, 40), "photo": rights(950, 10, 10)}
    found = compare(*({style: one[i] for style, one in said.items()} for i in (0, 1)))
    assert found.difference == {"ink": pytest.approx(-2), "photo": pytest.approx(0)}
    assert found.mean_difference == pytest.approx(-1)
    assert found.worst == pytest.approx(-2)
    # normal approximation: the variance of a mean of gains of -1, 0 and 1
    error = 100 * ((0.06 - 0.02**2) / 1000 + 0.02 / 1000) ** 0.5 / 2
    assert found.interval[0] == pytest.approx(-1 - 1.96 * error, abs=0.05)
    assert found.interval[1] == pytest.approx(-1 + 1.96 * error, abs=0.05)


def test_a_picture_is_right_by_the_highest_logits():
    found = {
        "style": torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 4.0]]),
        "concept": torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    }
    verdicts = judge_pictures(found, "ink", ["dog", "cat", "cat"], ["ink", "photo"], ["cat", "dog", "tree"])
    assert verdicts.right_style.tolist() == [True, False, True]
    assert verdicts.right_concept.tolist() == [True, True, False]
