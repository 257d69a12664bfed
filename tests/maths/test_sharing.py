"""Every sample of the global batch is trained on once, and every style counts as much as it should."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dmm.maths.sharing import is_uneven, share_batch
from dmm.recipes.recipe import Earlier, Recipe
from dmm.recipes.teacher import Teacher
from dmm.training.building import roles_of
from dmm.training.machine import shares_of

CASES = [(320, 8, 16), (320, 8, 8), (40, 8, 1), (41, 8, 1), (30, 8, 3), (29, 3, 8), (4, 4, 2), (7, 1, 1), (9, 2, 3)]


@pytest.mark.parametrize(("batch_size", "num_teachers", "num_processes"), CASES)
def test_samples_are_dealt_out_once_and_styles_count_alike(batch_size, num_teachers, num_processes):
    equal = [1 / num_teachers] * num_teachers
    shares = [share_batch(batch_size, equal, num_processes, process) for process in range(num_processes)]
    dealt = [index for groups in shares for group in groups for index in group.indices]
    assert sorted(dealt) == list(range(batch_size))
    for teacher in range(num_teachers):
        mine = [group for groups in shares for group in groups if group.teacher == teacher]
        assert sum(group.weight * len(group.indices) for group in mine) == pytest.approx(1 / num_teachers)
    order = sorted((group.indices.start, group.teacher) for groups in shares for group in groups)
    assert [teacher for _, teacher in order] == sorted(teacher for _, teacher in order)


def test_with_as_many_processes_as_teachers_each_serves_one():
    for process in range(16):
        assert [group.teacher for group in share_batch(320, [1 / 8] * 8, 16, process)] == [process % 8]


def test_one_process_serves_all():
    assert [group.teacher for group in share_batch(40, [1 / 8] * 8, 1, 0)] == list(range(8))


def test_a_batch_too_small_for_its_processes_is_refused():
    with pytest.raises(ValueError, match="a batch of 15 gives teacher 7 1 samples for the 2 processes"):
        share_batch(15, [1 / 8] * 8, 16, 0)
    assert all(share_batch(16, [1 / 8] * 8, 16, process) for process in range(16))


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_shares_need_not_be_equal(num_processes):
    shares = [0.25, 0.25, 0.5]
    dealt = [share_batch(41, shares, num_processes, process) for process in range(num_processes)]
    groups = [group for groups in dealt for group in groups]
    assert sorted(index for group in groups for index in group.indices) == list(range(41))
    for teacher, share in enumerate(shares):
        mine = [group for group in groups if group.teacher == teacher]
        assert sum(len(group.indices) for group in mine) == (10, 10, 21)[teacher]
        assert sum(group.weight * len(group.indices) for group in mine) == pytest.approx(share)


def test_teachers_weigh_as_the_recipe_says():
    teachers = [Teacher(name=name, model="a/b", weight=weight) for name, weight in {"ink": 3, "clay": 1}.items()]
    data = {"images": Path(__file__).parent}
    recipe = Recipe(base="a/b", teachers=teachers, data=data, styles={"rank": 0}, training={"steps": 1})
    assert shares_of(recipe) == [0.75, 0.25]
    kept = Earlier(model="a/b", regularization=0.2)
    assert shares_of(recipe.model_copy(update={"earlier": kept})) == pytest.approx([0.6, 0.2, 0.2])
    assert [role.share for role in roles_of(recipe, SimpleNamespace(reach={}), ["ink", "clay"])] == [0.75, 0.25]


def test_uneven_shares_are_known():
    assert [is_uneven(8, w) for w in (1, 2, 3, 4, 8, 12, 16)] == [False, False, True, False, False, True, False]
