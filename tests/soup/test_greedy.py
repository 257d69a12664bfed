"""Greedy soups, with a score that wants the first convolution's mean to be near a number."""

import sys

import pytest
from safetensors.torch import load_file
from soup_models import *  # noqa: F403 - fixtures

from dmm.errors import UserError
from dmm.soup.cook import cook
from dmm.soup.greedy import run_score
from dmm.soup.ledger import read_ledger
from dmm.soup.recipe import SoupRecipe

KEY = "model.diffusion_model.input_blocks.0.0.weight"
SCORE = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as file:
    print("scoring...")
    print(-abs(file.get_tensor("KEY").float().mean().item() - float(sys.argv[2])))
""".replace("KEY", KEY)


def test_it_keeps_what_the_score_wants(models, tmp_path):
    (tmp_path / "score.py").write_text(SCORE)
    means = {name: load_file(models / f"{name}.safetensors")[KEY].float().mean().item() for name in "abc"}
    best, other, worst = sorted(means, key=means.get)
    # the wish is halfway between two, so that the third can only harm
    wish = (means[best] + means[other]) / 2
    teachers = [{"name": name, "model": str(models / f"{name}.safetensors")} for name in "abc"]
    score = f"'{sys.executable}' '{tmp_path / 'score.py'}' {{model}} {wish}"
    made = cook(SoupRecipe(method="greedy", teachers=teachers, score=score), tmp_path / "s.safetensors")
    ledger = read_ledger(made.path)
    assert {entry["name"] for entry in ledger.entries} == {best, other}
    assert worst in made.notes[-1]
    assert [one["models"] for one in ledger.greedy["tried"][:3]] == [["a"], ["b"], ["c"]]
    uniform = SoupRecipe(method="soup", teachers=[one for one in teachers if one["name"] in (best, other)])
    one, soup = load_file(cook(uniform, tmp_path / "u.safetensors").path), load_file(made.path)
    assert all(one[name].equal(soup[name]) for name in one)
    again = cook(ledger.recipe, tmp_path / "again.safetensors", ledger=ledger).path
    assert again.read_bytes() == made.path.read_bytes()
    assert not list(tmp_path.glob(".greedy-*"))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no judge')", "ended with status 1: no judge"),
        ("print('nan')", "printed 'nan' last"),
        ("print('good')", "printed 'good' last"),
    ],
)
def test_scores_that_are_none(tmp_path, code, message):
    with pytest.raises(UserError, match=message):
        run_score(f'"{sys.executable}" -c "{code}" {{model}}', tmp_path)


def test_a_command_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be run"):
        run_score("/no/such/judge {model}", tmp_path)
