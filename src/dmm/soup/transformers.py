"""Soups of single files that hold a transformer alone: told apart, and LoRAs put on them by the files' own names."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.families import guidance_name, title_of_lora, transformer_of
from dmm.formats.lora import LoraChange, read_lora_file
from dmm.formats.lora.forms import Whole
from dmm.formats.transformer_files import Span, Spot, layers_in_file
from dmm.soup.models import Layout, OpenModel
from dmm.soup.sources import Change, Changed

_TEXT_ENCODERS = ("lora_te", "text_encoder", "text_encoders.")


def is_transformer_alone(model: OpenModel) -> bool:
    """Whether a model is a single file that holds a transformer and nothing else."""
    return model.layout == "file" and transformer_of(model.family) is not None


def check_guidance(models: Sequence[OpenModel]) -> None:
    """Refuse models that read a guidance scale beside those that read none.

    Raises: UserError: naming one of each.
    """
    reads = {guidance_name(model.tensors): model for model in models}
    if len(reads) > 1 and None in reads:
        name, with_it = next((name, model) for name, model in reads.items() if name is not None)
        raise UserError(
            f"{with_it.label}: {with_it.path} is distilled to read a guidance scale (it holds '{name}'), "
            f"{reads[None].label}: {reads[None].path} reads none. Their average would paint in "
            "neither way; choose models of one kind."
        )


def check_translates(models: Sequence[OpenModel], layout: Layout) -> None:
    """Refuse transformers of which some, or what is made, lie in folders and others in single files.

    Args:
        layout: of what is made.
    Raises: UserError: naming the first that is kept otherwise.
    """
    for model in models:
        if transformer_of(model.family) and model.layout != layout:
            kinds = {"file": "a single file", "folder": "a folder"}
            raise UserError(
                f"{model.label}: {model.path} is {kinds[model.layout]}, and the soup {kinds[layout]}: of "
                f"{model.family.title} names are not translated from one to the other. Make soups of single files as a "
                "file (.safetensors), of folders as a folder."
            )


def put_lora_by_names(model: OpenModel, path: Path, scale: float) -> tuple[OpenModel, str | None]:
    """A transformer's file with a LoRA on it, made for the file's own names or for those that diffusers has.

    Args:
        path: of the LoRA's file.
    Returns: the model; and what the user should be told: which of the LoRA's layers are for what the file lacks.
    Raises: UserError: it changes layers that the model does not have; with how many fit.
    """
    file = read_lora_file(path)
    left = [name for name in file.layers if name.startswith(_TEXT_ENCODERS)]
    layers = {name: layer for name, layer in file.layers.items() if name not in left}
    spots = _spots(model)
    tensors = dict(model.tensors)
    unfit = []
    for name, layer in layers.items():
        spot = spots.get(name)
        changes = {
            "weight": None
            if layer.form is None
            else LoraChange("transformer", name, "weight", layer.form, layer.scaling, layer.magnitude),
            "bias": None if layer.bias is None else LoraChange("transformer", name, "bias", Whole(layer.bias)),
        }
        if spot is None or not all(_fits(model, spot, key, one) for key, one in changes.items() if one):
            unfit.append(name)
            continue
        for parameter, change in changes.items():
            if change is None:
                continue
            key = f"{spot.name}.{parameter}"
            kept = tensors[key]
            before = kept if isinstance(kept, Changed) else Changed(kept, ())
            whole = spot.spans == (Span(0, 0, kept.shape[0]),)
            one = Change(change, scale, None if whole else spot.spans)
            tensors[key] = replace(before, changes=(*before.changes, one))
    if unfit or not layers:
        title = title_of_lora(file.layers, file.metadata)
        raise UserError(
            f"{path}: {len(layers) - len(unfit)} of its {len(file.layers)} layers fit {model.path}, a transformer of "
            f"{model.family.title}{f'; {unfit[0]!r} does not' if unfit else ''}."
            f"{f' It says that it is of {title}.' if title and title != model.family.title else ''} Pass a LoRA that "
            "was made for this model; none of it is dropped quietly."
        )
    note = f"{path}: {len(left)} of its layers are text encoders', which {model.path} does not hold" if left else None
    return replace(model, tensors=tensors, loras=(*model.loras, path)), note


def _fits(model: OpenModel, spot: Spot, parameter: str, change: LoraChange) -> bool:
    kept = model.tensors.get(f"{spot.name}.{parameter}")
    if kept is None:
        return False
    rows = sum(span.count for span in spot.spans)
    columns = torch.Size(kept.shape[1:]).numel()
    of_norms = change.magnitude is None or change.magnitude.numel() in (rows, columns)
    return (change.form.num_rows, change.form.num_columns) == (rows, columns) and of_norms


def _spots(model: OpenModel) -> dict[str, Spot]:
    """Where the file keeps each layer, by every name that a LoRA may give it."""
    declared: Mapping[str, Tensor] = {
        name: torch.empty(source.shape, device="meta") for name, source in model.tensors.items()
    }
    own = {
        name.removesuffix(".weight"): Spot(name.removesuffix(".weight"), (Span(0, 0, len(tensor)),))
        for name, tensor in declared.items()
        if name.endswith(".weight") and tensor.ndim
    }
    transformer = transformer_of(model.family)
    assert transformer is not None
    spots: dict[str, Spot] = {}
    # a name that both have means the file's own layer
    for layer, spot in (*own.items(), *layers_in_file(declared, transformer).items()):
        flat = layer.replace(".", "_")
        for name in (
            layer,
            *(f"{prefix}{layer}" for prefix in ("diffusion_model.", "model.diffusion_model.", "transformer.")),
            *(f"base_model.model.{prefix}{layer}" for prefix in ("", "transformer.")),
            *(f"{prefix}{flat}" for prefix in ("lora_unet_", "lora_transformer_", "lycoris_")),
        ):
            spots.setdefault(name, spot)
    return spots
