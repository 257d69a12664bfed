"""A process that cannot answer a signal, since it waits for one that is gone, ends with a word."""

import subprocess
import sys

BLOCKED = """
import ctypes, os, signal, threading
import dmm.processes as processes

class Two:
    num_processes, process_index = 2, 1

processes.PartialState = Two
processes._HANG_SECONDS = 1.0
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with processes.stop_signals() as asked_to_stop:
    if {blocked}:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        libc.pthread_mutex_lock(mutex)  # no signal interrupts it
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked_to_stop()
"""


def run(blocked):
    command = [sys.executable, "-c", BLOCKED.format(blocked=blocked)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_blocked_process_ends_with_a_word_when_it_is_asked_to_stop():
    ended = run(blocked=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("dmm: error: Rank 1 of 2 was asked to stop, and has waited 1 s")


def test_one_that_is_not_blocked_notes_the_signal():
    ended = run(blocked=False)
    assert (ended.returncode, ended.stderr) == (0, "")
