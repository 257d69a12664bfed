"""What the README and the docs tell people to type is what the program takes."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from dmm.cli import COMMANDS
from dmm.cli.arguments import Parser
from dmm.recipes.accelerating import load_few_step_recipe
from dmm.recipes.recipe import load_recipe
from dmm.soup.recipe import load_soup_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    """Every ``dmm`` command line of every page."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split("&&"):
                    words = shlex.split(part, comments=True)
                    if words[:1] == ["dmm"]:
                        yield pytest.param(words[1:], id=f"{page.name}: {part.strip()}")


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_is_one_that_the_program_takes(words, monkeypatch):
    monkeypatch.setattr("dmm.cli.hardware.count_devices", lambda _: None)  # pages are for every machine
    command, *rest = words
    assert command in COMMANDS
    module = importlib.import_module(f"dmm.cli.{command}")
    parser = Parser(command, module.__doc__)
    module.add_arguments(parser)
    parser.parse(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_is_one(page, tmp_path):
    for block in blocks(page, "yaml"):
        if "teachers:" not in block:
            continue
        for name in re.findall(r"[\w/.-]+", block):
            if name.endswith((".safetensors", ".txt")):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).touch()
            elif name.startswith(("models/", "mine-work/")):
                (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
        given = yaml.safe_load(block)
        if "method" in given:
            assert len(load_soup_recipe(tmp_path / "recipe.yaml").teachers) == len(given["teachers"])
            continue
        # what a command line adds: dmm add MERGED RECIPE.yaml
        overrides = ["earlier.model=models/merged"] if "earlier" in given else []
        (tmp_path / "models" / "merged").mkdir(parents=True, exist_ok=True)
        assert len(load_recipe(tmp_path / "recipe.yaml", overrides).teachers) == len(given["teachers"])


def test_the_few_step_recipe_is_one(tmp_path):
    (tmp_path / "prompts.txt").touch()
    (block,) = blocks(ROOT / "docs" / "accelerate.md", "yaml")
    (tmp_path / "fast.yaml").write_text(block, encoding="utf-8")
    assert load_few_step_recipe(tmp_path / "fast.yaml", ["model=owner/name"]).guidance == (7.0, 7.0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
