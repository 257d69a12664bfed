"""LoRAs: read, check against a model, fuse into its weights; write.

Read are kohya's layout and those of diffusers and PEFT. Each adds to a layer's weight W

    W + scale * alpha / rank * up @ down

where down is (rank, in, ...) and up (out, rank, ...), for linear layers and convolutions alike. It is computed here
rather than by PEFT: one formula serves all layouts, and the map that loads is the map that was checked.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from dmm.errors import UserError
from dmm.families import LORA_MARKERS, Family
from dmm.files.json import parse_json
from dmm.formats.detect import LORA_FILE, check_is_lora
from dmm.formats.tensors import Header, check_finite, read_header, read_tensors, write_tensors

_PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
_COMPONENTS = ("unet", "text_encoder")
_PEFT_CONFIG = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraLayerWeights:
    """What a LoRA adds to one layer."""

    component: str
    """``unet`` or ``text_encoder``."""
    module: str
    """The layer's path within it."""
    down: Tensor
    """(rank, in, ...), float32."""
    up: Tensor
    """(out, rank, ...), float32."""
    scaling: float
    """alpha / rank."""


def read_lora(path: Path, models: Mapping[str, Any], *, allow_pickle: bool = False) -> list[LoraLayerWeights]:
    """Read a LoRA and check that all of it fits a model.

    Args:
        path: its file, or a folder that diffusers saved one to.
        models: ``unet`` and ``text_encoder``, with weights or on the meta device.
    Raises: UserError: not a readable LoRA; a relative that is not a plain one; none or not all of its layers are the
        model's; shapes that do not fit; values that are not finite.
    """
    if path.is_dir():
        path = path / LORA_FILE
    header = read_header(path, allow_pickle=allow_pickle)
    check_is_lora(path, header)
    names = split_names(path, list(header.tensors))
    layers = _layers_by_name(models)
    _check_known(path, list(names), layers)
    tensors = read_tensors(path)
    check_finite(tensors, str(path))
    peft_config = read_peft_config(path, header)
    result = []
    for name, parts in names.items():
        component, module = layers[name]
        if "down" not in parts or "up" not in parts:
            raise UserError(
                f"{path}: the layer '{name}' has {' and '.join(sorted(parts))} but not both down and up. "
                "The file is incomplete; download it again."
            )
        down, up = tensors[parts["down"]].float(), tensors[parts["up"]].float()
        weight = models[component].get_submodule(module).weight
        if down.flatten(1).shape[1] != weight[0].numel() or up.flatten(1).shape != (len(weight), len(down)):
            raise UserError(
                f"{path}: the layer '{name}' has down {tuple(down.shape)} and up {tuple(up.shape)}, which do not fit "
                f"the model's weight {tuple(weight.shape)}. It was trained on another model; pass that as the base."
            )
        if "alpha" in parts:
            scaling = tensors[parts["alpha"]].item() / len(down)
        else:
            scaling = peft_scaling(path, peft_config, component, module, rank=len(down))
        result.append(LoraLayerWeights(component, module, down, up, scaling))
    return result


@torch.no_grad()
def fuse_lora(pipeline: Any, lora: list[LoraLayerWeights], scale: float) -> None:
    """Add a LoRA to a pipeline's weights, in place; the sum is rounded once to the weights' dtype."""
    for layer in lora:
        weight = getattr(pipeline, layer.component).get_submodule(layer.module).weight
        delta = scale * layer.scaling * (layer.up.flatten(1) @ layer.down.flatten(1))
        weight.copy_(weight.float() + delta.reshape(weight.shape).to(weight.device))


def save_kohya_lora(
    path: Path,
    models: Mapping[str, nn.Module],
    family: Family,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the PEFT adapters of a pipeline's parts in kohya's layout.

    Args:
        models: by the components' names, with one LoRA adapter each (``add_adapter``) on linear layers, convolutions.
        family: of the pipeline.
        dtype: of the written weights; by default each keeps its own. Alphas are float32.
        metadata: further strings for the header.
    Raises: UserError: there is no adapter.
    """
    tensors: dict[str, Tensor] = {}
    ranks: set[int] = set()
    for component, model in models.items():
        for module, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            (adapter,) = layer.active_adapters
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            name = kohya_name(component, module)
            tensors[f"{name}.lora_down.weight"] = down.to(dtype) if dtype else down
            tensors[f"{name}.lora_up.weight"] = up.to(dtype) if dtype else up
            # from the scaling rather than from the config's alpha: it holds under rank-stabilised scaling too
            tensors[f"{name}.alpha"] = torch.tensor(float(layer.scaling[adapter] * len(down)))
            ranks.add(len(down))
    if not tensors:
        raise UserError(f"{path}: the model has no LoRA adapter to write. Add one with `add_adapter` and train it.")
    written = {
        "format": "pt",
        **family.lora_metadata,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
    }
    write_tensors(path, tensors, {**written, **(metadata or {})})


def split_names(path: Path, keys: list[str]) -> dict[str, dict[str, str]]:
    """Layer name -> part -> key."""
    names: dict[str, dict[str, str]] = {}
    for key in keys:
        for suffix, part in _PARTS.items():
            if key.endswith(suffix):
                names.setdefault(key.removesuffix(suffix).replace(".processor.", "."), {})[part] = key
                break
        else:
            raise UserError(
                f"{path}: '{key}' is no part of a plain LoRA (down, up and alpha). LoHa, LoKr, Tucker and DoRA are not "
                "read; fuse them into a full checkpoint with the tool they come from."
            )
    return names


def _layers_by_name(models: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Each layer that a LoRA can be on, by every name that a layout gives it; kohya's comes first."""
    names: dict[str, tuple[str, str]] = {}
    for component in _COMPONENTS:
        for module, layer in models[component].named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layouts = [kohya_name(component, module), f"{component}.{module}"]
                if component == "text_encoder":
                    # with and without the level that transformers 5.6 dropped; diffusers' writer of kohya's layout
                    # says te1 of any model
                    layouts.append(f"{component}.text_model.{module}")
                    flat = module.replace(".", "_")
                    layouts += [f"lora_te{one}_{level}{flat}" for one in ("", "1") for level in ("", "text_model_")]
                names.update(dict.fromkeys(layouts, (component, module)))
    return names


def kohya_name(component: str, module: str) -> str:
    """A layer's name in kohya's layout."""
    # the level that transformers 5.6 dropped from the class is kept in the files
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    return prefix + module.replace(".", "_")


def _check_known(path: Path, names: list[str], layers: Mapping[str, object]) -> None:
    unknown = [name for name in names if name not in layers]
    if not unknown:
        return
    advice = next(
        (f"It is of {title}" for title, marker in LORA_MARKERS if any(marker in name for name in names)),
        "It was trained on another architecture",
    )
    if len(unknown) == len(names):
        raise UserError(
            f"{path}: none of its {len(names)} layers is one of this model's: it has '{unknown[0]}', the model "
            f"'{next(iter(layers))}'. {advice}; pass a LoRA made for this one."
        )
    raise UserError(
        f"{path}: {len(unknown)} of its {len(names)} layers are not this model's: "
        f"{', '.join(repr(name) for name in unknown[:3])}{', ...' if len(unknown) > 3 else ''}. "
        f"{advice}; none of it is dropped quietly."
    )


def read_peft_config(path: Path, header: Header) -> dict[str, Any]:
    """PEFT's config, which diffusers keeps in a LoRA's metadata; empty where there is none.

    Raises: UserError: it is no JSON object.
    """
    config = parse_json(header.metadata.get(_PEFT_CONFIG, "{}"), f"{path}: its metadata '{_PEFT_CONFIG}'")
    if not isinstance(config, dict):
        raise UserError(f"{path}: its metadata '{_PEFT_CONFIG}' is no JSON object. Download the file again.")
    return config


def peft_scaling(path: Path, config: Mapping[str, Any], component: str, module: str, rank: int) -> float:
    """Alpha / rank by PEFT's config; 1 without one.

    Raises: UserError: what the config says of it is no number.
    """
    try:
        alphas: Mapping[str, float] = config.get(f"{component}.alpha_pattern") or {}
        default = config.get(f"{component}.lora_alpha", rank)
        alpha = float(alphas.get(get_pattern_key(list(alphas), module), default))
        if not math.isfinite(alpha):
            raise ValueError(f"an alpha is {alpha}")
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise UserError(
            f"{path}: its metadata '{_PEFT_CONFIG}' tells of no alphas that can be read ({error}). Download the file "
            "again."
        ) from error
    return float(alpha / rank**0.5) if config.get(f"{component}.use_rslora") else alpha / rank
