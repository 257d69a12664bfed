"""The house: its wings, and that data flows through them in one direction."""

import ast
import re
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


# what a family calls its denoiser may be said outside of families/ only as a word of somebody else's, for this reason
SAYS = re.compile(r"(?<![A-Za-z])unet(?![A-Za-z])")
MAY_SAY = {
    "data/synthesis.py": "a key of cached pictures' digests: another would paint them all again",
    "evaluation/held_out.py": "likewise",
    "evaluation/painting.py": "likewise",
    "formats/lora/names.py": "kohya's prefix of every family's denoiser, and an example",
    "formats/lora/reading.py": "likewise",
    "formats/original_layout.py": "diffusers' own converters, and the layout that Component names",
    "models/authors.py": "the module of the authors' code that their model_index.json names",
    "models/few_step.py": "a student's denoiser, by which checkpoints name its tensors",
    "models/student.py": "likewise",
    "planning/step.py": "likewise",
    "recipes/recipe.py": "`kind: unet`, a value of recipes",
    "soup/recipe.py": "likewise",
    "soup/transformers.py": "prefixes in LoRAs' files, and what stands for a component where there is none",
    "training/acceleration.py": "a student's",
    "training/adapting.py": "a student's",
    "training/few_step.py": "a student's",
    "training/merge.py": "a student's",
    "training/preview.py": "a student's",
    "training/trainer.py": "a student's",
}


def said(path):
    """Strings, names and attributes of a module's code that a denoiser goes by; docstrings are prose."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            word = node.value
        else:
            word = getattr(node, "attr", None) or getattr(node, "arg", None) or getattr(node, "id", None) or ""
        named = not isinstance(node, ast.Name | ast.arg | ast.keyword)  # a variable may be any transformer
        if SAYS.search(word) or (named and word == "transformer"):
            yield f"{path.relative_to(SOURCE)}:{node.lineno}: {word}"


def test_what_a_denoiser_is_called_is_its_familys_to_say():
    paths = [path for path in SOURCE.rglob("*.py") if "families" not in path.parts]
    found = {str(path.relative_to(SOURCE)): list(said(path)) for path in paths}
    assert not [one for name, words in found.items() if name not in MAY_SAY for one in words]
    # who says it no longer has no leave to say it again
    assert not [name for name in MAY_SAY if not found.get(name)]
