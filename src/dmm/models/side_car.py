"""The side-car of a merged model on disk: ``styles/`` beside the folders of a stock pipeline.

It holds ``config.json`` and ``diffusion_pytorch_model.safetensors``, a :class:`StylePrompts` as
diffusers saves models, and ``styles.json``, which tells where each style came from.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from dmm.errors import UserError
from dmm.files.json import read_json
from dmm.formats.skeleton import check_tensors
from dmm.formats.tensors import check_finite, read_header
from dmm.models.style_names import STYLES_FOLDER, read_style_config
from dmm.models.styles import Provenance, StylePrompts

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PROVENANCE_FILE = "styles.json"


def read_side_car(folder: Path) -> StylePrompts | None:
    """Read the style prompts of a merged model, in float32.

    Args:
        folder: of the whole pipeline.
    Returns: None for a stock model, which has no ``styles/``.
    Raises: UserError: a file is missing, damaged or does not fit the others.
    """
    styles = folder / STYLES_FOLDER
    if not styles.is_dir():
        return None
    names, dim = read_style_config(styles / "config.json")
    with torch.device("meta"):
        skeleton = StylePrompts(names, dim)
    check_tensors(skeleton, read_header(styles / WEIGHTS_FILE).tensors, str(styles / WEIGHTS_FILE))
    # small beside the UNet, so that float32 costs nothing: terms are computed in it whatever the UNet's dtype
    prompts: StylePrompts = StylePrompts.from_pretrained(styles, torch_dtype=torch.float32, local_files_only=True)
    check_finite(prompts.state_dict(), str(styles))
    prompts.provenance = _read_provenance(styles / PROVENANCE_FILE, names)
    return prompts


def write_side_car(prompts: StylePrompts, folder: Path) -> None:
    """Write style prompts, and their provenance where it is known, into the folder of a whole pipeline."""
    styles = folder / STYLES_FOLDER
    prompts.save_pretrained(styles)
    if prompts.provenance:
        written = {"styles": [asdict(one) for one in prompts.provenance]}
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (styles / PROVENANCE_FILE).write_text(text, encoding="utf-8")


def _read_provenance(path: Path, names: list[str]) -> list[Provenance]:
    if not path.is_file():
        return []
    found = read_json(path).get("styles")
    if not isinstance(found, list) or not all(_is_provenance(one) for one in found):
        keys = ", ".join(field.name for field in fields(Provenance))
        raise UserError(f"{path} has no 'styles' that is a list of objects with the strings {keys}.")
    provenance = [Provenance(**one) for one in found]
    if [one.name for one in provenance] != names:
        raise UserError(
            f"{path} tells of {', '.join(one.name for one in provenance)}, config.json beside it of "
            f"{', '.join(names)}. The files belong to different models."
        )
    return provenance


def _is_provenance(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == {field.name for field in fields(Provenance)}
        and all(isinstance(one, str) for one in value.values())
    )
