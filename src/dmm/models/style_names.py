"""The styles' names of a merged model on disk, which its side-car's config holds.

Nothing heavy at import, so that a style that there is none of is told before anything is loaded.
"""

from collections.abc import Sequence
from pathlib import Path

from dmm.errors import UserError
from dmm.files.json import read_json
from dmm.files.weights import read_declared

STYLES_FOLDER = "styles"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
STYLE_PROMPTS_CLASS = "StylePrompts"
CODEBOOK = "model_embedding.weight"
"""What the authors' layout calls the style prompts, among a UNet's weights."""

_WIDEST = 100_000  # of style prompts; of the models that there are, none is a tenth as wide


def read_style_names(model: str) -> list[str] | None:
    """The styles of a model, as far as they can be told without its weights.

    Args:
        model: a folder, a single file or a hub id.
    Returns: the styles in the order of the codebook, none of a stock model; None where only weights, or the hub, tell.
    Raises: UserError: the side-car's config is missing or broken.
    """
    folder = Path(model).expanduser()
    if folder.is_file():
        return [] if _is_stock_file(folder) else None
    styles = find_side_car(folder)
    if styles is not None:
        return read_style_config(styles / "config.json")[0]
    index = folder / "model_index.json"
    # the authors' pipelines, whose classes are named for the method, have their styles among the UNet's weights
    return [] if index.is_file() and "DMM" not in str(read_json(index).get("_class_name")) else None


def check_addition(model: str, names: Sequence[str], added: Sequence[str]) -> None:
    """Refuse to add styles to what is no merged model, or has a style of one of these names.

    Args:
        names: of the model's styles; none of a stock model.
    Raises: UserError.
    """
    if not names:
        raise UserError(
            f"{model} is no merged model: it has no {STYLES_FOLDER}/ folder. Merge models with `dmm merge`, then "
            "add to what that has made."
        )
    for name in added:
        if name in names:
            raise UserError(f"teacher '{name}': {model} has a style of that name; choose another name.")


def find_side_car(folder: Path) -> Path | None:
    """The side-car of a merged model, whole or damaged; None of a stock one, also of an export beside its patches."""
    styles = folder / STYLES_FOLDER
    names = {file.name for file in styles.iterdir()} if styles.is_dir() else set()
    is_patches = bool(names) and all(name.endswith(".safetensors") and name != WEIGHTS_FILE for name in names)
    return styles if styles.is_dir() and not is_patches else None


def _is_stock_file(path: Path) -> bool:
    """Whether a safetensors file surely has no styles in it; what is wrong with a file is told once it is opened."""
    try:
        names = read_declared(path)[0]
    except UserError:
        return False
    return not any(name.endswith(CODEBOOK) for name in names)


def read_style_config(path: Path) -> tuple[list[str], int]:
    """The styles' names and the width of their prompts, of a side-car's ``config.json``.

    Raises: UserError: it is missing, or describes something else.
    """
    config = read_json(path)
    names, dim = config.get("names"), config.get("dim")
    if config.get("_class_name") != STYLE_PROMPTS_CLASS:
        raise UserError(f"{path} describes a {config.get('_class_name')}; a {STYLE_PROMPTS_CLASS} was expected.")
    # a name is typed, printed and made a file's
    if not isinstance(names, list) or not names or not all(isinstance(one, str) and one.isprintable() for one in names):
        raise UserError(f"{path}: its names are {names}; a list of the styles' names was expected.")
    if len(set(names)) < len(names):
        raise UserError(f"{path} names a style twice: {', '.join(names)}. Every style needs a name of its own.")
    if not isinstance(dim, int) or isinstance(dim, bool) or not 0 <= dim <= _WIDEST:
        raise UserError(f"{path}: its dim is {dim}; the width of the style prompts was expected.")
    return names, dim
