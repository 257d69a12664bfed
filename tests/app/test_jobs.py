"""One at a time, with progress, until cancelled."""

import time

import pytest

from dmm.app.jobs import Cancelled, Desk, Job


def test_a_job_tells_how_far_it_is_then_what_came_of_it():
    def work(advance):
        for _ in range(4):
            advance(0.5)
            time.sleep(0.02)
        return "done"

    *shares, result = Job(work, 2, Desk()).watch(every=0.01)
    assert result == "done"
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1


def test_a_cancelled_job_ends_at_its_next_step():
    steps = []

    def work(advance):
        while True:
            advance(0.01)
            steps.append(1)
            time.sleep(0.01)

    job = Job(work, 1, Desk())
    watched = job.watch(every=0.01)
    next(watched)
    job.cancel()
    with pytest.raises(Cancelled):
        list(watched)
    ended = len(steps)
    time.sleep(0.05)
    assert len(steps) == ended


def test_a_closed_desk_cancels_what_is_done_and_what_waits():
    desk = Desk()

    def endless(advance):
        while True:
            advance(0.0)
            time.sleep(0.005)

    watchers = [Job(endless, 1, desk).watch(every=0.01) for _ in range(2)]
    for watched in watchers:
        next(watched)
    desk.is_closed.set()
    for watched in watchers:
        with pytest.raises(Cancelled):
            list(watched)


def test_who_stops_asking_cancels_and_the_next_one_has_a_turn():
    desk = Desk()

    def endless(advance):
        while True:
            advance(0.0)
            time.sleep(0.005)

    watched = Job(endless, 1, desk).watch(every=0.01)
    next(watched)
    watched.close()
    assert list(Job(lambda _: 5, 1, desk).watch(every=0.01))[-1] == 5


def test_no_two_work_at_once():
    desk, working, most = Desk(), [], []

    def work(advance):
        working.append(1)
        most.append(len(working))
        time.sleep(0.02)
        working.pop()

    watchers = [Job(work, 1, desk).watch(every=0.01) for _ in range(3)]
    for watcher in watchers:
        next(watcher)
    for watcher in watchers:
        list(watcher)
    assert most == [1, 1, 1]


def test_what_the_work_raises_is_raised_to_whoever_watches():
    def work(advance):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(Job(work, 1, Desk()).watch(every=0.01))
