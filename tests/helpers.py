"""Changing model files, and comparing what they open to."""

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rewrite(source: Path, target: Path, change, metadata: dict[str, str] | None = None) -> Path:
    """Write ``source``'s tensors to ``target`` after ``change(tensors)``; the metadata stays unless given."""
    tensors = load_file(source)
    change(tensors)
    with safe_open(source, framework="pt") as file:
        kept = file.metadata() or {}
    save_file(tensors, target, kept if metadata is None else metadata)
    return target


def copy_folder(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def same_weights(one, other) -> bool:
    """Whether two pipelines' weights are equal bit for bit."""
    for name in ("unet", "vae", "text_encoder"):
        left, right = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        if left.keys() != right.keys() or not all(left[key].equal(right[key]) for key in left):
            return False
    return True
