"""What the original layout of single files calls each tensor of a model, and in what form it keeps it.

Most tensors have another name there and nothing else. Some lie in one with others: OpenCLIP's attention keeps queries,
keys and values in a row. Some lie turned, as its projection does; some have two axes of length one, as the VAE's
attention, which convolves there. A :class:`Place` tells which.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor

from dmm.families import Component, Family

V_PREDICTION_MARK = "v_pred"
"""An empty tensor of this name says, by custom, that the UNet predicts v."""
ZERO_SNR_MARK = "ztsnr"
"""An empty tensor of this name says, by custom, that the schedule is rescaled to zero terminal SNR."""
MARKS = (V_PREDICTION_MARK, ZERO_SNR_MARK)
HARMLESS = (
    "model_ema.*",
    "first_stage_model.loss.*",
    "*.position_ids",
    "*logit_scale",
    "cond_stage_model.*text_projection*",
    "*alphas_cumprod*",
    "betas",
    "posterior_*",
    "logvar",
    "lvlb_weights",
    "scale_factor",
    *MARKS,
)
"""Left in files by training scripts and by older libraries, whatever the family; nothing that samples reads them."""

_QKV = 3


@dataclass(frozen=True)
class Place:
    """Where a single file keeps one of a model's tensors.

    Attributes:
        name: of the file's tensor.
        part, num_parts: which part of the file's tensor it is, along the first axis; all are of one length.
        is_turned: it is the file's matrix, transposed.
        is_convolution: the file has two axes of length one behind its own; some files lack them.
    """

    name: str
    part: int = 0
    num_parts: int = 1
    is_turned: bool = False
    is_convolution: bool = False

    def take(self, kept: Tensor) -> Tensor:
        """The model's tensor out of the file's; one whose shape does not allow it comes back as it is."""
        if self.num_parts > 1 and kept.ndim and len(kept) % self.num_parts == 0:
            return kept.chunk(self.num_parts)[self.part]
        if self.is_turned and kept.ndim == 2:
            return kept.T
        if self.is_convolution and kept.ndim == 4:
            return kept[:, :, 0, 0]
        return kept


def original_places(models: Mapping[str, Any], family: Family) -> dict[str, dict[str, Place]]:
    """Where the original layout keeps each tensor.

    No table by hand: diffusers' own converters are run on dummies under every plausible original name, and those that
    land on a tensor of the model are that tensor's place.

    Args:
        models: by the components' names, all or some of them, with weights or on the meta device.
    Returns: component -> the model's own name -> its place; tensors that the layout has no place for are left out.
    """
    return {
        component.name: _places(component, models[component.name])
        for component in family.components
        if component.layout and component.name in models
    }


def original_names(models: Mapping[str, Any], family: Family) -> dict[str, dict[str, str]]:
    """As :func:`original_places`, but the names alone."""
    return {
        component: {ours: place.name for ours, place in places.items()}
        for component, places in original_places(models, family).items()
    }


def to_original(tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """A component's tensors as the original layout keeps them."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for ours, tensor in tensors.items():
        place = places[ours]
        if place.is_turned:
            tensor = tensor.T
        if place.is_convolution and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        parts.setdefault(place.name, []).append((place.part, tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])])
        if len(found) > 1
        else found[0][1]
        for name, found in parts.items()
    }


def from_original(tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """A component's tensors by its own names, as many of them as a file of the original layout has."""
    return {ours: place.take(tensors[place.name]) for ours, place in places.items() if place.name in tensors}


def is_unread(name: str, family: Any) -> bool:
    """Whether nothing that samples reads a tensor of this name.

    Args:
        name: in a single file, or ``component/name`` of a folder.
        family: of the model; what is of no family that opens has no components.
    """
    if any(fnmatchcase(name, known) for known in HARMLESS):
        return True
    for component in getattr(family, "components", ()):
        for prefix in (component.original_prefix, f"{component.name}/"):
            own = name.removeprefix(prefix)
            if own != name and any(fnmatchcase(own, known) for known in component.unread):
                return True
    return False


def _places(component: Component, model: Any) -> dict[str, Place]:
    assert component.layout is not None
    candidates, convert = _LAYOUTS[component.layout]
    dummies: dict[str, Tensor] = {}
    names: list[str] = []
    for name, form in candidates(model):
        name = component.original_prefix + name
        if name not in dummies:
            # every dummy knows its number, and every part of it which one it is; as a row, so that turning it shows
            dummies[name] = torch.tensor([[len(names), part] for part in range(_QKV if form == "joined" else 1)])
            if form == "convolution":
                dummies[name] = dummies[name][:, :, None, None]
            names.append(name)
    converted = convert(component, model, dummies)
    places = {}
    for ours in model.state_dict():
        found = converted.get(ours)
        if found is None:
            continue
        number, part = found.flatten().tolist()
        dummy = dummies[names[number]]
        places[ours] = Place(
            names[number],
            part,
            num_parts=len(dummy),
            is_turned=found.shape[1] == 1,
            is_convolution=dummy.ndim == 4,
        )
    return places


_Candidates = Iterator[tuple[str, str]]


def _unet_candidates(unet: Any) -> _Candidates:
    for name in _unet_names(unet):
        yield name, "plain"


def _unet_names(unet: Any) -> Iterator[str]:
    names = list(unet.state_dict())
    yield from DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"].values()
    yield from DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"].values()
    layers = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    resnet = [f"0.{layer}" for layer in layers]
    attention = [f"1.{name.split('.', 1)[1]}" for name in _after(names, ".attentions.")]
    per_block = unet.config.layers_per_block + 1
    for i in range(len(unet.config.block_out_channels) * per_block + 1):
        for tail in _parameters([*resnet, "0.op"]) + attention:
            yield f"input_blocks.{i}.{tail}"
        block = f"up_blocks.{i // per_block}."
        # the upsampler comes after the attention, where there is one
        place = 2 if any(name.startswith(f"{block}attentions.") for name in names) else 1
        for tail in _parameters([*resnet, f"{place}.conv"]) + attention:
            yield f"output_blocks.{i}.{tail}"
    for i, tail in product((0, 2), _parameters(resnet)):
        yield f"middle_block.{i}.{tail.removeprefix('0.')}"
    for tail in attention:
        yield f"middle_block.{tail}"


def _convert_unet(_: Component, unet: Any, dummies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = convert_ldm_unet_checkpoint(dummies, unet.config)
    return converted


def _vae_candidates(vae: Any) -> _Candidates:
    for name in DIFFUSERS_TO_LDM_MAPPING["vae"].values():
        yield name, "plain"
    resnet = _parameters(["norm1", "conv1", "norm2", "conv2", "nin_shortcut"])
    for side, level, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for tail in resnet:
            yield f"{side}.mid.block_1.{tail}", "plain"
            yield f"{side}.mid.block_2.{tail}", "plain"
        for tail in _parameters(["norm", "q", "k", "v", "proj_out"]):
            convolves = tail.endswith("weight") and not tail.startswith("norm")
            yield f"{side}.mid.attn_1.{tail}", "convolution" if convolves else "plain"
        for i in range(len(vae.config.block_out_channels)):
            for j, tail in product(range(vae.config.layers_per_block + 1), resnet):
                yield f"{side}.{level}.{i}.block.{j}.{tail}", "plain"
            for tail in _parameters([f"{sampler}.conv"]):
                yield f"{side}.{level}.{i}.{tail}", "plain"


def _convert_vae(_: Component, vae: Any, dummies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(dummies, vae.config)
    return converted


def _clip_candidates(text_encoder: Any) -> _Candidates:
    for name in text_encoder.state_dict():
        yield f"text_model.{name.removeprefix('text_model.')}", "plain"


def _convert_clip(component: Component, text_encoder: Any, dummies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _with_level(text_encoder, convert_ldm_clip_checkpoint(dummies, component.original_prefix))


def _open_clip_candidates(text_encoder: Any) -> _Candidates:
    for name in DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].values():
        yield name, "plain"
    for i in range(text_encoder.config.num_hidden_layers):
        block = f"transformer.resblocks.{i}"
        yield f"{block}.attn.in_proj_weight", "joined"
        yield f"{block}.attn.in_proj_bias", "joined"
        for tail in _parameters(["ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]):
            yield f"{block}.{tail}", "plain"


def _convert_open_clip(component: Component, text_encoder: Any, dummies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # the dummies' projection, of one row, tells the converter how long a part is
    return _with_level(text_encoder, convert_open_clip_checkpoint(text_encoder, dummies, component.original_prefix))


def _with_level(text_encoder: Any, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the level of names that transformers 5.6 dropped from one class and kept in another."""
    if hasattr(text_encoder, "text_model"):
        return dict(converted)
    return {name.removeprefix("text_model."): dummy for name, dummy in converted.items()}


_LAYOUTS = {
    "unet": (_unet_candidates, _convert_unet),
    "vae": (_vae_candidates, _convert_vae),
    "clip": (_clip_candidates, _convert_clip),
    "open_clip": (_open_clip_candidates, _convert_open_clip),
}


def _after(names: list[str], part: str) -> list[str]:
    return list(dict.fromkeys(name.split(part, 1)[1] for name in names if part in name))


def _parameters(layers: list[str]) -> list[str]:
    return [f"{layer}.{parameter}" for layer in layers for parameter in ("weight", "bias")]
