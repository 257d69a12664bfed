"""The benchmark of a student of SD 1.5's size runs, narrow."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"


def test_it_trains_and_tells_time_and_memory():
    command = [sys.executable, str(SCRIPT), "--width", "32", "--size", "64"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "step 2: score" in ran.stdout
    assert "samples/s" in ran.stdout
    assert "peak memory" in ran.stdout
