"""Every sample of the global batch is trained on once, and every style counts the same."""

import pytest

from dmm.sharing import is_uneven, share_batch

CASES = [(320, 8, 16), (320, 8, 8), (40, 8, 1), (41, 8, 1), (30, 8, 3), (29, 3, 8), (4, 4, 2), (7, 1, 1), (9, 2, 3)]


@pytest.mark.parametrize(("batch_size", "num_teachers", "num_processes"), CASES)
def test_samples_are_dealt_out_once_and_styles_count_alike(batch_size, num_teachers, num_processes):
    shares = [share_batch(batch_size, num_teachers, num_processes, process) for process in range(num_processes)]
    dealt = [index for groups in shares for group in groups for index in group.indices]
    assert sorted(dealt) == list(range(batch_size))
    for teacher in range(num_teachers):
        mine = [group for groups in shares for group in groups if group.teacher == teacher]
        assert sum(group.weight * len(group.indices) for group in mine) == pytest.approx(1 / num_teachers)
    order = sorted((group.indices.start, group.teacher) for groups in shares for group in groups)
    assert [teacher for _, teacher in order] == sorted(teacher for _, teacher in order)


def test_with_as_many_processes_as_teachers_each_serves_one():
    for process in range(16):
        assert [group.teacher for group in share_batch(320, 8, 16, process)] == [process % 8]


def test_one_process_serves_all():
    assert [group.teacher for group in share_batch(40, 8, 1, 0)] == list(range(8))


def test_a_batch_too_small_for_its_processes_is_refused():
    with pytest.raises(ValueError, match="smallest batch is 16"):
        share_batch(15, 8, 16, 0)
    assert all(share_batch(16, 8, 16, process) for process in range(16))


def test_uneven_shares_are_known():
    assert [is_uneven(8, w) for w in (1, 2, 3, 4, 8, 12, 16)] == [False, False, True, False, False, True, False]
