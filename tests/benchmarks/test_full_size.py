"""The benchmark of a student of SD 1.5's size runs, narrow."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"


@pytest.mark.parametrize("rank", ["0", "2"])
def test_it_trains_and_tells_time_and_memory(rank):
    command = [sys.executable, str(SCRIPT), "--width", "32", "--size", "64", "--rank", rank]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "step 2: score" in ran.stdout
    assert "samples/s" in ran.stdout
    assert "peak memory" in ran.stdout


def test_it_calibrates_a_teacher():
    command = [sys.executable, str(SCRIPT), "--width", "32", "--size", "64", "--rank", "2", "--calibrate"]
    ran = subprocess.run([*command, "--samples", "2"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "layers on 2 samples" in ran.stdout
