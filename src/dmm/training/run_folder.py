"""The folder of a run: what of its recipe may not change when it goes on, and how its result comes into it."""

import logging
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.files.runs import INDEX, RECIPE
from dmm.recipes.parts import Part, exists

_logger = logging.getLogger(__name__)


def check_same(before: Part, now: Part, binding: Collection[str], folder: Path) -> None:
    """Refuse to go on with a run under a recipe for another model.

    Args:
        binding: keys of a recipe that a run may not change once it has begun.
        folder: of the run.
    Raises: UserError: with what has changed.
    """
    old, new = (flat(recipe.model_dump(mode="json", include=set(binding))) for recipe in (before, now))
    for key in [*old, *new]:
        if old.get(key) == new.get(key):
            continue
        if _has_moved(old.get(key), new.get(key)):
            _logger.warning("%s: '%s' is gone; '%s' is taken for the same.", key, old[key], new[key])
        else:
            raise UserError(
                f"The run in '{folder}' began with {key} {old.get(key, 'unset')}, the recipe now says "
                f"{new.get(key, 'unset')}. Resume with '{folder / RECIPE}', or name another output."
            )


def _has_moved(before: Any, now: Any) -> bool:
    """Whether both are paths of what has one name, and it is no longer where it was."""
    if not (isinstance(before, str) and isinstance(now, str) and Path(before).is_absolute()):
        return False
    return Path(before).name == Path(now).name and not exists(Path(before))


def put_in_place(folder: Path, result: str, index: str = INDEX) -> None:
    """Move a result, which is whole, from a folder of the run's into the run's own; its index last."""
    made = sorted((folder / result).iterdir(), key=lambda path: path.name == index)
    remove(folder, (path.name for path in made))
    for path in made:
        path.rename(folder / path.name)
    (folder / result).rmdir()


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files and folders of a run, as far as they are there."""
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Nested keys and values as ``teachers.0.name``."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {place: value}
    return {name: one for key, inner in items for name, one in flat(inner, f"{place}.{key}".strip(".")).items()}
