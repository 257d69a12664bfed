"""What one process does for all; that none is left waiting for one that is gone."""

import os
import re
import subprocess
import sys

import pytest

BLOCKED = """
import ctypes, os, signal, threading
import dmm.training.processes as processes

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


SHARED = """
import atexit, os, signal, sys
import torch
from dmm.errors import UserError
from dmm.training.processes import join_processes, on_main

def say(line):
    # launchers run Python unbuffered, where each part that print is given is a write of its own
    sys.stdout.write(line + "\\n")

def work():
    assert state.is_main_process
    if "{fate}" == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if "{fate}" == "fails":
        raise UserError("told once")
    return {{"rows": 3}}

# what is registered first runs last; a process that ends with its connections open aborts now and then
atexit.register(lambda: say("parted" if not torch.distributed.is_initialized() else "still bound"))
state = join_processes()
try:
    say(f"has {{on_main(work)}}")
except UserError as error:
    sys.exit(str(error))
"""


def launch_two(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=150)


@pytest.mark.parametrize("fate", ["well", "fails", "killed"])
def test_what_the_main_process_does_for_all(tmp_path, fate):
    ended = launch_two(tmp_path, SHARED.format(fate=fate))
    assert (ended.returncode == 0) == (fate == "well")
    assert ended.stdout.count("has {'rows': 3}") == (2 if fate == "well" else 0)
    if fate == "well":
        assert ended.stdout.count("parted") == 2
    assert "still bound" not in ended.stdout
    assert ended.stderr.splitlines().count("told once") == (1 if fate == "fails" else 0)
    assert "AssertionError" not in ended.stderr


EACH = """
import os, signal, sys
from dmm.errors import UserError
from dmm.training.processes import join_processes, on_all

def say(line):
    # launchers run Python unbuffered, where each part that print is given is a write of its own
    sys.stdout.write(line + "\\n")

def work():
    if "{fate}" == "killed" and not state.is_main_process:
        os.kill(os.getpid(), signal.SIGKILL)
    if "{fate}" == "all fail" or "{fate}" == "one fails" and not state.is_main_process:
        raise UserError("told once")
    return state.process_index

state = join_processes()
try:
    say(f"has {{on_all(work)}}")
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("fate", ["well", "one fails", "all fail", "killed"])
def test_what_each_process_does_and_all_wait_for(tmp_path, fate):
    ended = launch_two(tmp_path, EACH.format(fate=fate))
    assert (ended.returncode == 0) == (fate == "well")
    assert sorted(re.findall("has .", ended.stdout)) == (["has 0", "has 1"] if fate == "well" else [])
    assert ended.stderr.splitlines().count("told once") == (1 if "fail" in fate else 0)
    assert "UnboundLocalError" not in ended.stderr
