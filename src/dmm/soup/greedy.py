"""The greedy soup: of many models those whose average a score likes best."""

import math
import shlex
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from dmm.errors import UserError
from dmm.files.outputs import check_file, check_new_folder
from dmm.soup.make import Bar, Made, layout_of, make_soup, no_bar
from dmm.soup.reading import Digests
from dmm.soup.recipe import SoupRecipe


def make_greedy_soup(
    recipe: SoupRecipe,
    output: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    digests: Digests | None = None,
    bar: Bar = no_bar,
) -> Made:
    """Score every model alone; then, from the best on, keep each in the average that does not lower its score.

    What is written is the uniform soup of those that were kept, its ledger with all scores.

    Args: see :func:`dmm.soup.make.make_soup`; the recipe's method is ``greedy``.
    Raises: UserError: also where the score's command fails, or prints no number last.
    Source: Model soups, https://arxiv.org/abs/2203.05482, recipe 1.
    """
    assert recipe.score is not None  # the recipe saw to it
    (check_file if layout_of(output) == "file" else check_new_folder)(output, overwrite=overwrite)
    digests = digests or Digests()
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    tried: list[dict[str, object]] = []

    def score(names: list[str]) -> float:
        # beside the output: candidates are as large, and that is where there is room
        with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".greedy-") as folder:
            candidate = Path(folder) / f"candidate{output.suffix}"
            make_soup(_soup_of(recipe, names), candidate, threads=threads, digests=digests, bar=bar)
            value = run_score(str(recipe.score), candidate)
        tried.append({"models": names, "score": value})
        return value

    alone = {name: score([name]) for name in sorted(recipe.names)}
    first, *others = sorted(alone, key=lambda name: (-alone[name], name))
    kept, best = [first], alone[first]
    for name in others:
        value = score([*kept, name])
        if value >= best:
            kept, best = [*kept, name], value
    made = make_soup(
        _soup_of(recipe, kept),
        output,
        overwrite=overwrite,
        threads=threads,
        digests=digests,
        bar=bar,
        greedy={"score": recipe.score, "tried": tried},
    )
    left = [name for name in sorted(recipe.names) if name not in kept]
    told = f"kept {', '.join(kept)} (score {best:g}){'; left out ' + ', '.join(left) if left else ''}"
    return replace(made, notes=(*made.notes, told))


def run_score(command: str, model: Path) -> float:
    """Run a score's command; no shell is between.

    Args:
        command: with ``{model}`` where the model's path goes.
    Returns: the number in the last line that it prints.
    Raises: UserError: it cannot be run, fails, or prints no number.
    """
    try:
        words = [word.replace("{model}", str(model)) for word in shlex.split(command)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except (OSError, ValueError) as error:
        raise UserError(f"score: '{command}' cannot be run: {error}.") from error
    lines = done.stdout.split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.split("\n")) if line.strip()), "it says nothing")
        raise UserError(f"score: '{command}' ended with status {done.returncode}: {reason}")
    try:
        value = float(last)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"score: '{command}' printed '{last}' last, where a finite number was expected.")
    return value


def _soup_of(recipe: SoupRecipe, names: list[str]) -> SoupRecipe:
    plain = recipe.model_dump(exclude_defaults=True)
    chosen = [teacher for teacher in plain["teachers"] if teacher["name"] in names]
    shards = {name: told for name, told in recipe.shards.items() if name in names}
    left_out = ("score", "shards")
    kept = {key: value for key, value in plain.items() if key not in left_out}
    return SoupRecipe.model_validate({**kept, "method": "soup", "teachers": chosen, "shards": shards})
