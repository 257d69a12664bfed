"""What a written pipeline folder needs beyond what the libraries write, so that every tool opens it.

diffusers and transformers write for their own newest versions; kohya's scripts, web UIs and older releases read these
folders too.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from dmm.errors import UserError
from dmm.files.json import read_json
from dmm.formats.tensors import read_tensors, write_tensors

_TEXT_LEVEL = "text_model."
_ABOVE_IT = ("text_projection.weight", "logit_scale")


def complete_folder(folder: Path) -> None:
    """Make a stock pipeline folder, in place, one that older libraries and other tools open as the newest do.

    Tokenizers get their vocabulary in the form that transformers 4 reads; text encoders the names that other tools
    expect, and float32 as what they load in; configs lose the path that they were once loaded from.

    Raises: UserError: a tokenizer cannot be read.
    """
    for tokenizer in sorted(folder.glob("tokenizer*/tokenizer.json")):
        _write_vocabulary(tokenizer)
    for config in sorted(folder.glob("text_encoder*/config.json")):
        # transformers loads what the config names, diffusers float32 unless told: of two dtypes no pipeline paints
        _edit_json(config, drop=("torch_dtype",), dtype="float32")
        if str(read_json(config).get("model_type", "")).startswith("clip"):
            _name_as_tools_do(config.with_name("model.safetensors"))
    for config in (folder / "model_index.json", *sorted(folder.glob("*/config.json"))):
        _edit_json(config, drop=("_name_or_path",))


def _write_vocabulary(tokenizer: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` beside a ``tokenizer.json`` of the kind that had them."""
    try:
        model = Tokenizer.from_file(str(tokenizer)).model
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{tokenizer} is no tokenizer that can be read: {error}. Get another copy.") from error
    if isinstance(model, BPE) and not (tokenizer.parent / "vocab.json").is_file():
        model.save(str(tokenizer.parent))


def _name_as_tools_do(text_encoder: Path) -> None:
    """Give a text encoder's tensors the level of names that transformers 5.6 dropped and other tools expect."""
    if not text_encoder.is_file():
        return
    tensors = read_tensors(text_encoder)
    if any(name.startswith(_TEXT_LEVEL) for name in tensors):
        return
    named = {name if name in _ABOVE_IT else _TEXT_LEVEL + name: tensor for name, tensor in tensors.items()}
    write_tensors(text_encoder, named, {"format": "pt"})


def _edit_json(path: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> None:
    found = read_json(path)
    edited = {key: value for key, value in found.items() if key not in drop} | changes
    if edited != found:
        path.write_text(json.dumps(edited, indent=2, sort_keys=True) + "\n", encoding="utf-8")
