"""Paintings in the background: one at a time, each with its progress, each to be cancelled."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Cancelled(Exception):  # noqa: N818  (no error: somebody asked for it)
    """Somebody took back what they had asked for."""


class Desk:
    """Where jobs are done, no two of them at once, until it is closed."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.is_closed = threading.Event()


class Job(Generic[Result]):
    """Work that tells how far it is, in a thread of its own.

    Args:
        work: is given a function to be called with what was done since it was last called.
        total: what that adds up to.
        desk: where it is done; once that is closed, it is cancelled.
    """

    def __init__(self, work: Callable[[Callable[[float], None]], Result], total: float, desk: Desk) -> None:
        self._work, self._total, self._desk = work, total, desk
        self._done, self._is_cancelled = 0.0, threading.Event()
        self._outcome: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def cancel(self) -> None:
        """Let it end after the step that it is at."""
        self._is_cancelled.set()

    def watch(self, every: float = 0.25) -> Iterator[float | Result]:
        """Begin, and yield how much is done, in [0, 1], until it is; then what came of it.

        Whoever stops asking cancels it.

        Args:
            every: seconds between two yields.
        Raises: Cancelled; or what the work raises.
        """
        self._thread.start()
        try:
            while True:
                yield min(self._done / self._total, 1.0)
                try:
                    outcome = self._outcome.get(timeout=every)
                except queue.Empty:
                    continue
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
                return
        finally:
            self.cancel()
            self._thread.join()

    def _advance(self, done: float) -> None:
        if self._is_cancelled.is_set() or self._desk.is_closed.is_set():
            raise Cancelled
        self._done += done

    def _run(self) -> None:
        try:
            with self._desk.turn:
                self._advance(0.0)
                self._outcome.put(self._work(self._advance))
        except BaseException as error:
            self._outcome.put(error)
