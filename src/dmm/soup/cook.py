"""One entrance to all kinds of soup."""

from pathlib import Path

from dmm.errors import UserError
from dmm.files.claims import claimed
from dmm.soup.greedy import make_greedy_soup
from dmm.soup.ledger import Ledger
from dmm.soup.lora import make_lora
from dmm.soup.make import Bar, Made, make_soup, no_bar
from dmm.soup.recipe import SoupRecipe


def cook(
    recipe: SoupRecipe,
    output: Path,
    *,
    ledger: Ledger | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    bar: Bar = no_bar,
) -> Made:
    """Make what a recipe asks for.

    Args:
        output: a .safetensors file; of full models also a folder.
        ledger: that of the soup which the recipe comes from; models must be those that it tells of.
        overwrite: replace an output that exists.
        threads: by default as many as there are cores.
    Raises: UserError: another process is writing to the output; or anything else that the user can mend, before
        anything is written.
    """
    _check_keeps_sources(recipe, output)
    expected = None if ledger is None else ledger.digests
    with claimed(output):
        if recipe.kind == "lora":
            return make_lora(recipe, output, overwrite=overwrite, threads=threads, expected=expected, bar=bar)
        if recipe.method == "greedy":
            return make_greedy_soup(recipe, output, overwrite=overwrite, threads=threads, bar=bar)
        # scores are of that very choice of models: another has none
        greedy = ledger.greedy if ledger is not None and recipe == ledger.recipe else None
        return make_soup(
            recipe, output, overwrite=overwrite, threads=threads, expected=expected, bar=bar, greedy=greedy
        )


def _check_keeps_sources(recipe: SoupRecipe, output: Path) -> None:
    """Refuse an output in the place of what it is made of.

    Raises: UserError: naming whose model it is.
    """
    place = output.resolve()
    for owner, source in recipe.sources:
        taken = Path(source).resolve()
        if output.exists() and Path(source).exists() and (taken == place or taken in place.parents):
            raise UserError(
                f"'{output}' is what the soup is made of ({owner}): without it, it could never be made again from its "
                "ledger, nor changed. Name another output."
            )
