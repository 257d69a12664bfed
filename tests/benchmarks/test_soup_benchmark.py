import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soup.py"


def test_only_what_it_measures_is_taken(tmp_path):
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path / "new"), "--only", "ties", "tie"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "invalid choice: 'tie'" in ended.stderr
    assert not (tmp_path / "new").exists()
