"""The house: its wings, and that data flows through them in one direction."""

import ast
from pathlib import Path

import pytest

import dmm

SOURCE = Path(dmm.__file__).parent
# from the ground up: a module imports from its own floor and from those below it
FLOORS = (
    ("errors",),
    ("files", "maths"),
    ("recipes", "families"),
    ("formats",),
    ("models",),
    ("data", "pipeline"),
    ("training", "soup"),
    ("evaluation", "report", "demo", "planning"),
    ("app", "cli"),
)
HEIGHTS = {wing: height for height, wings in enumerate(FLOORS) for wing in wings}


def wings_imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            if module.startswith("dmm."):
                yield module.split(".")[1]


@pytest.mark.parametrize("wing", HEIGHTS)
def test_imports_run_downwards(wing):
    paths = sorted((SOURCE / wing).rglob("*.py")) or [SOURCE / f"{wing}.py"]
    upwards = {
        (str(path.relative_to(SOURCE)), imported)
        for path in paths
        for imported in wings_imported(path)
        if HEIGHTS[imported] > HEIGHTS[wing]
    }
    assert not upwards


def test_every_wing_has_its_floor():
    wings = {path.stem for path in SOURCE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert wings - {"__init__", "__main__", "__pycache__", "py"} == set(HEIGHTS)
