"""LoRAs onto a model's weights, and into files of kohya's layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dmm.errors import UserError
from dmm.families import Family
from dmm.formats.lora.forms import LoraChange
from dmm.formats.lora.names import kohya_name
from dmm.formats.tensors import write_tensors


@torch.no_grad()
def fuse_lora(pipeline: Any, lora: Sequence[LoraChange], scale: float) -> None:
    """Add a LoRA to a pipeline's weights, in place; the sum is rounded once to the weights' dtype."""
    for change in lora:
        module = getattr(pipeline, change.component).get_submodule(change.module)
        parameter = getattr(module, change.parameter)
        parameter.copy_(change.changed(parameter.float(), scale))


def save_kohya_lora(
    path: Path,
    models: Mapping[str, nn.Module],
    family: Family | None,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the PEFT adapters of a pipeline's parts in kohya's layout.

    Args:
        models: by the components' names, with one LoRA adapter each (``add_adapter``) on linear layers, convolutions.
        family: of the pipeline; None of one that is not known here, of which the header then says nothing.
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
            name = kohya_name(component, module, family)
            tensors[f"{name}.lora_down.weight"] = down.to(dtype) if dtype else down
            tensors[f"{name}.lora_up.weight"] = up.to(dtype) if dtype else up
            # from the scaling rather than from the config's alpha: it holds under rank-stabilised scaling too
            tensors[f"{name}.alpha"] = torch.tensor(float(layer.scaling[adapter] * len(down)))
            ranks.add(len(down))
    if not tensors:
        raise UserError(f"{path}: the model has no LoRA adapter to write. Add one with `add_adapter` and train it.")
    written = {
        "format": "pt",
        **(family.lora_metadata if family else {}),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
    }
    write_tensors(path, tensors, {**written, **(metadata or {})})
