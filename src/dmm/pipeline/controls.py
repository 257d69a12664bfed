"""Merged ControlNets in use: load, choose controls, save, export.

A merged ControlNet is a stock one whose controls are chosen as styles of a merged model are; it goes into diffusers'
ControlNet pipelines as any other does, on a merged model or a stock one.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from dmm.errors import UserError
from dmm.families import FAMILIES, Family, family_of_controlnet
from dmm.files.json import read_json
from dmm.files.outputs import new_file, new_folder
from dmm.files.runs import check_finished
from dmm.formats.tensors import check_finite, write_tensors
from dmm.maths.mixes import Mix
from dmm.models.adapters import NOTHING
from dmm.models.adapting import mixed_adapter, twin_of
from dmm.models.controlnets import check_controlnet, open_controlnet, write_controlnet
from dmm.models.side_car import read_side_car
from dmm.models.styles import StylePrompts, attach_styles, bake, detach_styles, styled_port
from dmm.pipeline.choosing import choose, style_term_of, temporarily
from dmm.pipeline.styled import told_of_full_disk


def load_controls(
    path: str | Path, *, torch_dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> Any:
    """Load a merged ControlNet; no control is set.

    Args:
        path: of the folder that ``dmm merge`` or :func:`save_controls` wrote.
        torch_dtype: of the weights in memory.
        device: where to put them; by default they stay on the CPU.
    Returns: a stock ControlNet, for diffusers' pipelines.
    Raises: UserError: it is not merged, of no family that opens, or something is wrong with its files.
    """
    folder = Path(path).expanduser()
    net = open_net(folder, torch_dtype=torch_dtype)
    if styled_port(net) is None:
        raise UserError(f"{folder} is a stock ControlNet, which has one control only. Open it with diffusers.")
    return net if device is None else net.to(device)


def open_net(folder: Path, denoiser: Any = None, *, torch_dtype: torch.dtype = torch.float32) -> Any:
    """Open a ControlNet, merged or stock, held against the denoiser that it is for, where there is one.

    Raises: UserError: something is wrong with its files, or it is for another model.
    """
    family = _check(folder, denoiser)
    prompts = read_side_car(folder)
    net = open_controlnet(folder, family, torch_dtype=torch_dtype)
    if prompts is not None:
        attach_styles(net, prompts, family.port)
        net.save_pretrained = MethodType(_save_pretrained, net)
    return net


def control_names(pipe: Any) -> list[str]:
    """The controls of a merged ControlNet.

    Args:
        pipe: the ControlNet, or a pipeline that has it.
    Raises: UserError: it is not merged.
    """
    return _prompts_of(_net_of(pipe)).names


def set_control(pipe: Any, control: Mix | Sequence[Mix | None] | None) -> None:
    """Choose what a merged ControlNet follows, until the next call.

    Args:
        pipe: the ControlNet, or a pipeline that has it and no other merged one.
        control: the name of one; a mix, names with weights that sum to 1; a list of these, one for each image (prompts
            x images per prompt, in the pipeline's order); or None for none.
    Raises: UserError: the ControlNet is not merged, there is no control of that name, weights do not sum to 1, or the
        list is empty.
    """
    choose(_net_of(pipe), control)


def temporary_control(pipe: Any, control: Mix | Sequence[Mix | None] | None) -> AbstractContextManager[None]:
    """:func:`set_control` for the length of a block."""
    return temporarily(_net_of(pipe), control)


def save_controls(net: Any, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a merged ControlNet, controls and all, whole or not at all.

    Args:
        net: of :func:`load_controls`.
        folder: becomes a stock ControlNet's, which diffusers opens, with ``styles/`` in it.
    Raises: UserError: it is not merged; the folder is not empty, or cannot be written.
    """
    with new_folder(Path(folder), overwrite=overwrite) as temporary, told_of_full_disk(folder):
        write_controlnet(baked(net, None), _prompts_of(net), temporary, _family_of(net.config, "The ControlNet"))


def export_control(
    net: Any, control: Mix, output: Path, *, dtype: torch.dtype = torch.float32, overwrite: bool = False
) -> None:
    """Write one control, or mix, as an ordinary ControlNet.

    Args:
        net: of :func:`load_controls`, in float32, so that weights are rounded once.
        output: a diffusers folder; or a .safetensors file of the same tensors, as most tools open.
        dtype: of the written weights.
    Raises: UserError: there is no such control, a weight is too large for the dtype, or the output exists or cannot be
        written.
    """
    stock = baked(net, control).to(dtype)
    check_finite(stock.state_dict(), f"the control in {dtype}")
    if output.suffix == ".safetensors":
        with new_file(output, overwrite=overwrite) as temporary, told_of_full_disk(output):
            tensors = {name: tensor.contiguous() for name, tensor in stock.state_dict().items()}
            write_tensors(temporary, tensors, {"format": "pt"})
    else:
        with new_folder(output, overwrite=overwrite) as temporary, told_of_full_disk(output):
            write_controlnet(stock, None, temporary, _family_of(net.config, "The ControlNet"))


@torch.no_grad()
def baked(net: Any, control: Mix | None) -> Any:
    """A stock ControlNet of its own weights that follows one control, or mix, of a merged one; None: no control."""
    prompts = _prompts_of(net)
    family = _family_of(net.config, "The ControlNet")
    adapter = mixed_adapter(prompts.names, prompts.adapters, control) if prompts.adapters else NOTHING
    term = style_term_of(prompts, control) if control is not None and prompts.config.dim else None
    twin = twin_of(net)
    port = styled_port(net)
    assert port is not None
    port.adaptation.give_own_weights(twin, adapter)
    detach_styles(twin)
    vars(twin).pop("save_pretrained", None)
    twin = copy.deepcopy(twin)
    if term is not None:
        bake(twin, term, family.port)
    return twin


def _check(folder: Path, denoiser: Any) -> Family:
    check_finished(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no ControlNet's diffusers folder: it holds no config.json. Name one.")
    config = read_json(folder / "config.json")
    family = _family_of(config, str(folder))
    check_controlnet(folder, family, denoiser)
    return family


def _family_of(config: Mapping[str, Any], where: str) -> Family:
    family = family_of_controlnet(config)
    if family is None:
        kinds = ", ".join(
            dict.fromkeys(one.controlnet.model_class.__name__ for one in FAMILIES.values() if one.controlnet)
        )
        raise UserError(
            f"{where} holds a {config.get('_class_name')}, not a {kinds} of a family that opens here. Name a "
            "ControlNet's diffusers folder."
        )
    return family


def _net_of(pipe: Any) -> Any:
    """The merged ControlNet of a pipeline, or itself."""
    held = getattr(pipe, "controlnet", pipe)
    merged = [net for net in getattr(held, "nets", [held]) if isinstance(net, torch.nn.Module) and styled_port(net)]
    if not merged:
        raise UserError("There is no merged ControlNet here; load one with dmm.load_controls, and paint with that.")
    if len(merged) > 1:
        raise UserError(f"There are {len(merged)} merged ControlNets here: set the control on each of them.")
    return merged[0]


def _prompts_of(net: Any) -> StylePrompts:
    port = styled_port(net)
    if port is None:
        raise UserError("This ControlNet has no controls to choose from: it is a stock one.")
    return port.style_prompts


def _save_pretrained(net: Any, *args: Any, **kwargs: Any) -> None:
    warnings.warn(
        "save_pretrained writes what the controls of this merged ControlNet share, without the controls; "
        "dmm.save_controls(net, folder) writes both.",
        stacklevel=2,
    )
    type(net).save_pretrained(net, *args, **kwargs)
