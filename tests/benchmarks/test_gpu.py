"""The benchmark for a machine with a GPU runs on a CPU, narrow; a part that fails costs itself alone."""

import json
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
NARROW = ["--width", "32", "--size", "64", "--steps", "2", "--micro-batches", "1", "--limit", "250"]


def run(folder, *options):
    ran = subprocess.run(["bash", str(SCRIPT), str(folder), *options], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()


# each is a training of tens of millions of parameters in a process of its own
@pytest.mark.parametrize("name", ["sd15-rank16-b20", "sdxl-rank16-b4"])
def test_a_part_tells_rate_arithmetic_and_memory(tmp_path, name):
    (result,), table = run(tmp_path, *NARROW, "--only", name)
    assert result["name"] == name
    assert result["samples_per_second"] > 0
    assert result["tflops_per_second"] > 0
    assert result["peak_bytes"] > 100e6
    assert f"| {name} | " in table
    assert "On the CPU." in table


def test_what_fails_and_what_finds_no_time_is_told(tmp_path):
    (failed,), table = run(tmp_path, "--width", "30", "--steps", "2", "--only", "sd15-rank0-b20")
    assert failed["error"]
    assert "| sd15-rank0-b20 | " in table
    results, _ = run(tmp_path, "--budget", "1")
    assert {one["error"] for one in results} == {"no time was left"}
    assert len(results) == 11
