"""The side-car of a merged model on disk: ``styles/`` beside the folders of a stock pipeline.

It holds ``config.json`` and ``diffusion_pytorch_model.safetensors``, a :class:`StylePrompts` as
diffusers saves models, and ``styles.json``, which tells where each style came from; and the styles' adapters, where
they have any: :mod:`dmm.models.adapter_files`. Where they have nothing else, there are no style prompts' weights.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from dmm.errors import UserError
from dmm.families import Family
from dmm.files.digest import sha256
from dmm.files.json import read_json
from dmm.formats.building import building, check_config
from dmm.formats.folder import family_of_folder
from dmm.formats.skeleton import check_tensors
from dmm.formats.tensors import check_finite, read_header
from dmm.models.adapter_files import INDEX, read_adapters, write_adapters
from dmm.models.style_names import STYLES_FOLDER, WEIGHTS_FILE, find_side_car, read_style_config
from dmm.models.styles import Provenance, StylePrompts

PROVENANCE_FILE = "styles.json"


def read_side_car(folder: Path) -> StylePrompts | None:
    """Read the style prompts of a merged model, in float32.

    Args:
        folder: of the whole pipeline.
    Returns: None for a stock model, which has no ``styles/``.
    Raises: UserError: a file is missing, damaged or does not fit the others.
    """
    styles = find_side_car(folder)
    if styles is None:
        return None
    names, dim = read_style_config(styles / "config.json")
    prompts = _read_weights(styles, names, dim) if dim else StylePrompts(names, 0)
    prompts.provenance = _read_provenance(styles / PROVENANCE_FILE, names)
    prompts.adapters = read_adapters(styles)
    adapted = set(prompts.adapters)
    if not adapted <= set(names) or (not dim and adapted != set(names)):
        raise UserError(
            f"{styles}: config.json names the styles {', '.join(names)}, {INDEX} has adapters of "
            f"{', '.join(prompts.adapters) or 'none'}. The files belong to different models."
        )
    return prompts


def _read_weights(styles: Path, names: list[str], dim: int) -> StylePrompts:
    check_config(read_json(styles / "config.json"), styles / "config.json", StylePrompts)
    with torch.device("meta"):
        skeleton = StylePrompts(names, dim)
    tensors = read_header(styles / WEIGHTS_FILE).tensors
    check_tensors(skeleton, tensors, str(styles / WEIGHTS_FILE))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{styles / WEIGHTS_FILE}: '{name}' is kept in {tensor.dtype}, which holds no style prompts: they are "
                "numbers of any size. Get another copy."
            )
    # small beside the denoiser, so that float32 costs nothing: terms are computed in it whatever the denoiser's dtype
    with building(f"{styles} holds no style prompts that can be opened"):
        prompts: StylePrompts = StylePrompts.from_pretrained(styles, torch_dtype=torch.float32, local_files_only=True)
    check_finite(prompts.state_dict(), str(styles))
    return prompts


def write_side_car(prompts: StylePrompts, folder: Path, *, family: Family | None = None) -> None:
    """Write style prompts, adapters and their provenance where it is known, into the folder of a whole pipeline
    that is otherwise written already.

    Args:
        family: of a ControlNet, whose folder holds its weights itself.
    """
    styles = folder / STYLES_FOLDER
    if prompts.config.dim:
        prompts.save_pretrained(styles)
    else:
        prompts.save_config(styles)
    if prompts.adapters:
        if family:
            component, weights = "controlnet", folder
        else:
            family = family_of_folder(folder)
            component = family.denoiser.name
            weights = folder / component
        digest = sha256(*sorted(weights.glob("*.safetensors")))
        told = {one.name: family.lora_metadata | _metadata(one) for one in prompts.provenance}
        told = dict.fromkeys(prompts.names, family.lora_metadata) | told
        in_order = {name: prompts.adapters[name] for name in prompts.names if name in prompts.adapters}
        write_adapters(in_order, styles, base_sha256=digest, metadata=told, component=component, family=family)
    if prompts.provenance:
        written = {"styles": [asdict(one) for one in prompts.provenance]}
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (styles / PROVENANCE_FILE).write_text(text, encoding="utf-8")


def _metadata(provenance: Provenance) -> dict[str, str]:
    """What an adapter's header says of where it came from; of a path, the last part: the rest is nobody's business."""
    source = re.split(r"[\\/]", provenance.source.rstrip("\\/"))[-1]
    return {
        "modelspec.title": provenance.name,
        "modelspec.merged_from": source,
        "dmm.style": provenance.name,
        "dmm.teacher_sha256": provenance.sha256,
    }


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
