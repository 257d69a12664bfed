"""A step's samples are cut into micro-batches, each of one teacher where there are enough."""

import pytest

from dmm.maths.sharing import share_batch
from dmm.training.batches import cut


def groups_of(batch_size, num_teachers):
    return share_batch(batch_size, [1 / num_teachers] * num_teachers, 1, 0)


def teachers_of(micro_batch):
    return {teacher for teacher, _, _ in micro_batch}


@pytest.mark.parametrize(("batch_size", "micro_batch_size", "sizes"), [(320, 20, [20] * 16), (72, 8, [4, 5] * 8)])
def test_each_has_one_teacher_where_all_have_enough_samples(batch_size, micro_batch_size, sizes):
    micro_batches = cut(groups_of(batch_size, 8), micro_batch_size)
    assert all(len(teachers_of(one)) == 1 for one in micro_batches)
    assert list(map(len, micro_batches)) == sizes


def test_they_are_full_where_some_have_too_few():
    micro_batches = cut(groups_of(20, 8), 8)
    assert list(map(len, micro_batches)) == [8, 8, 4]
    assert len(teachers_of(micro_batches[0])) > 1


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 7, 40, 100])
def test_every_sample_is_there_once_in_its_order_and_with_its_weight(micro_batch_size):
    groups = groups_of(37, 4)
    found = [sample for one in cut(groups, micro_batch_size) for sample in one]
    assert found == [(group.teacher, index, group.weight) for group in groups for index in group.indices]
    assert sum(weight for _, _, weight in found) == pytest.approx(1)
    assert max(map(len, cut(groups, micro_batch_size))) <= micro_batch_size
