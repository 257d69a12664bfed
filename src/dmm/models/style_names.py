"""The styles' names of a merged model on disk, which its side-car's config holds.

Nothing heavy at import, so that a style that there is none of is told before anything is loaded.
"""

from pathlib import Path

from dmm.errors import UserError
from dmm.files.json import read_json

STYLES_FOLDER = "styles"
STYLE_PROMPTS_CLASS = "StylePrompts"


def read_style_names(folder: Path) -> list[str]:
    """The styles of a merged model, in the order of its codebook; none of a stock one.

    Args:
        folder: of the whole pipeline; a file, or the authors' layout, has no side-car to read and so no names here.
    Raises: UserError: the side-car's config is missing or broken.
    """
    styles = folder / STYLES_FOLDER
    return read_style_config(styles / "config.json")[0] if styles.is_dir() else []


def read_style_config(path: Path) -> tuple[list[str], int]:
    """The styles' names and the width of their prompts, of a side-car's ``config.json``.

    Raises: UserError: it is missing, or describes something else.
    """
    config = read_json(path)
    names, dim = config.get("names"), config.get("dim")
    if config.get("_class_name") != STYLE_PROMPTS_CLASS:
        raise UserError(f"{path} describes a {config.get('_class_name')}; a {STYLE_PROMPTS_CLASS} was expected.")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: its names are {names}; a list of the styles' names was expected.")
    if len(set(names)) < len(names):
        raise UserError(f"{path} names a style twice: {', '.join(names)}. Every style needs a name of its own.")
    if not isinstance(dim, int) or dim < 0:
        raise UserError(f"{path}: its dim is {dim}; the width of the style prompts was expected.")
    return names, dim
