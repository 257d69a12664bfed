"""ControlNets on disk, and what a merged one begins as.

A merged ControlNet is a stock folder, ``config.json`` and its weights, with ``styles/`` beside them: its styles are the
controls that were merged, and reach it as a model's do, at the port of its family.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Family
from dmm.files.json import read_json
from dmm.formats.building import building
from dmm.formats.folder import check_component, weight_files
from dmm.formats.skeleton import build_skeleton
from dmm.formats.tensors import check_finite
from dmm.models.side_car import write_side_car
from dmm.models.styles import StylePrompts

_SEEN_BY = "controlnet_cond_embedding."
"""What the names of the layers begin with that read the image."""


def check_controlnet(folder: Path, family: Family, denoiser: Any, *, name: str | None = None) -> Any:
    """Check all of a ControlNet that can be known without loading its weights.

    Args:
        folder: a diffusers ControlNet's, merged or not.
        denoiser: that it is to guide, with or without weights; None where that is not known.
        name: what errors call it; by default the folder.
    Returns: its skeleton.
    Raises: UserError: it is no ControlNet, of another family, or not whole.
    """
    name = name or str(folder)
    if family.controlnet is None:
        raise UserError(f"{name}: ControlNets of {family.title} are not known here. Leave it out.")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: {folder} is no ControlNet's diffusers folder: it holds no config.json. Name one, as "
            "save_pretrained writes it."
        )
    found = read_json(folder / "config.json")
    kind = family.controlnet.model_class.__name__
    if found.get("_class_name") != kind:
        raise UserError(
            f"{name}: {folder} holds a {found.get('_class_name')}, not a {kind}. Name a ControlNet's folder."
        )
    if denoiser is not None:
        check_guides(found, denoiser, name)
    skeleton = build_skeleton(folder, family.controlnet, family)
    check_component(folder, family.controlnet, skeleton, allow_pickle=False)
    return skeleton


def check_guides(config: Mapping[str, Any], denoiser: Any, name: str) -> None:
    """Hold a ControlNet's config against the denoiser that it is for.

    Raises: UserError: they differ where they must agree.
    """
    for key, what in (
        ("cross_attention_dim", "text of width"),
        ("in_channels", "latent channels:"),
        ("block_out_channels", "widths"),
        ("addition_embed_type", "additional embeddings"),
    ):
        found, expected = (_plain(one.get(key, denoiser.config.get(key))) for one in (config, denoiser.config))
        if found != expected:
            raise UserError(
                f"{name}: the ControlNet has {what} {found}, the model {expected}. It was made for a model of another "
                "family; choose one for this."
            )


def open_controlnet(folder: Path, family: Family, *, torch_dtype: torch.dtype = torch.float32) -> Any:
    """Load a ControlNet that :func:`check_controlnet` has passed; no style is on it.

    Raises: UserError: values that are not finite; or the library has something against its files all the same.
    """
    assert family.controlnet is not None  # check_controlnet has passed it
    _, variant = weight_files(folder, family.controlnet, allow_pickle=False)
    with building(f"{folder}: the ControlNet could not be opened"):
        net = family.controlnet.model_class.from_pretrained(
            folder, torch_dtype=torch_dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
    check_finite(net.state_dict(), str(folder))
    return net


def copy_of_encoder(nets: Iterable[Any], denoiser: Any) -> Any:
    """What ControlNets of one architecture have in common: the denoiser's own encoder, which each began as.

    The layers that read the image are the nets' average; those that give to the denoiser are zero, so that it guides
    nothing yet.

    Args:
        nets: at least one; each is let go before the next is asked for.
    """
    mean: dict[str, Tensor] = {}
    start, count = None, 0
    for net in nets:
        start, count = start or net, count + 1
        for name, tensor in net.state_dict().items():
            if name.startswith(_SEEN_BY):
                mean[name] = mean[name] + tensor if name in mean else tensor.clone()
    assert start is not None
    shared = denoiser.state_dict()
    state = {name: shared.get(name, torch.zeros_like(tensor)) for name, tensor in start.state_dict().items()}
    state |= {name: tensor / count for name, tensor in mean.items()}
    start.load_state_dict(state)
    return start


def write_controlnet(net: Any, prompts: StylePrompts | None, folder: Path, family: Family) -> None:
    """Fill a folder with a stock ControlNet, and its styles where it has any."""
    type(net).save_pretrained(net, folder)
    if prompts is not None:
        write_side_car(prompts, folder, family=family)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
