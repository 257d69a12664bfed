"""Single files of a transformer alone, as trainers and ComfyUI save them, and where they keep its layers.

Their tensors have the names that the model's authors gave them, with ``model.diffusion_model.`` before each or nothing;
text encoders and VAE lie elsewhere. diffusers names the same layers otherwise, and takes some apart: queries, keys and
values that lie in a row, or a scale before its shift. :func:`layers_in_file` tells which rows of which tensor a layer
is, so that what is made for either naming finds its place.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What some savers put before every name; ComfyUI reads files with and without."""

_WEIGHT = ".weight"
_WIDTH_IN_CODE = 3072  # which some of diffusers' converters take for granted
_WIDTH = "img_in.bias"  # a tensor of such a file that is as long


@dataclass(frozen=True)
class Span:
    """Rows of a layer that lie together in a file's tensor.

    Attributes:
        at: the first of them in the tensor.
        first, count: the first of them in the layer, and how many.
    """

    at: int
    first: int
    count: int


@dataclass(frozen=True)
class Spot:
    """Where a file keeps a layer.

    Attributes:
        name: that the file gives the layer whose rows it is among, without a prefix.
        spans: of its rows, in its own order.
    """

    name: str
    spans: tuple[Span, ...]


def common_prefix(names: Collection[str]) -> str:
    """What stands before all names of a transformer's file; nothing where some lack it."""
    return next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), "")


def layers_in_file(tensors: Mapping[str, Tensor], transformer: str) -> dict[str, Spot]:
    """Where a file keeps the layers that diffusers' class has, by the paths that they have there.

    No table by hand: diffusers' own converter is run on tensors that hold their rows' numbers.

    Args:
        tensors: what the file declares, without prefixes.
        transformer: the name of diffusers' class.
    Returns: nothing where diffusers cannot convert a file of such names.
    """
    entry = SINGLE_FILE_LOADABLE_CLASSES.get(transformer)
    if entry is None:
        return {}
    names = [name for name, tensor in tensors.items() if tensor.ndim]
    scale = _scale(tensors)
    starts, dummies, start = [], {}, 0
    for name in names:
        rows = len(tensors[name]) * scale[0] // scale[1]
        starts.append(start)
        dummies[name] = torch.arange(start, start + rows)
        start += rows
    try:
        converted = entry["checkpoint_mapping_fn"](dummies, config={})
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError):
        return {}
    begins = torch.tensor(starts)
    spots = {}
    for path, rows in converted.items():
        if not path.endswith(_WEIGHT) or not len(rows):
            continue
        number = int(torch.searchsorted(begins, rows[0], right=True)) - 1
        if not names[number].endswith(_WEIGHT):
            continue
        own = rows - starts[number]
        breaks = [0, *(own.diff() != 1).nonzero().flatten().add(1).tolist(), len(own)]
        spans = tuple(
            Span(*(n * scale[1] // scale[0] for n in (int(own[first]), first, last - first)))
            for first, last in pairwise(breaks)
        )
        spots[path.removesuffix(_WEIGHT)] = Spot(names[number].removesuffix(_WEIGHT), spans)
    return spots


def _scale(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """What rows are counted in for a converter that knows one width only: all of a file's grow with it."""
    width = tensors.get(_WIDTH)
    return (1, 1) if width is None or not len(width) else (_WIDTH_IN_CODE, len(width))
