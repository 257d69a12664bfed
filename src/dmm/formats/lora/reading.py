"""LoRAs and their relatives: read, whatever layout they are in, and checked against a model."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Family, family_of_names, title_of_lora
from dmm.files.json import parse_json
from dmm.files.lora_names import BUNDLED, check_complete, is_lora, split_names
from dmm.formats.lora.forms import Form, Hadamard, Kronecker, LoraChange, LowRank, Whole
from dmm.formats.lora.names import is_layer, layers_by_name, layers_by_original_name
from dmm.formats.original_layout import original_names
from dmm.formats.tensors import check_finite, read_header, read_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file of a folder that diffusers saved a LoRA to."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files of a folder that PEFT saved one to."""
_METADATA = "lora_adapter_metadata"
_LARGEST_ALPHA = 1e9  # those that people train with are below a thousand; JSON has numbers that no float holds

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraLayer:
    """What a file holds of one layer.

    Attributes:
        form: the change of its weight; None where only its bias changes.
        bias: the change of its bias, unscaled; or None.
        scaling: of both, where they are low-rank.
        magnitude: see :class:`dmm.formats.lora.forms.LoraChange`.
    """

    form: Form | None
    bias: Tensor | None
    scaling: float
    magnitude: Tensor | None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's file.

    Attributes:
        layers: by the names that the file gives them.
        dtype: that most of it is kept in.
        metadata: of its header.
    """

    path: Path
    layers: dict[str, LoraLayer]
    dtype: torch.dtype
    metadata: Mapping[str, str]


def lora_file(path: Path) -> Path:
    """The file of a LoRA that is passed as its file, or as the folder that diffusers or PEFT saved it to.

    Raises: UserError: a folder that holds none, or several, or a full model.
    """
    if not path.is_dir():
        return path
    if (path / "model_index.json").is_file():
        raise UserError(f"{path} is the folder of a full model, not of a LoRA. Pass it as the model, without a LoRA.")
    for name in (LORA_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    found = sorted(one for one in path.iterdir() if one.suffix.lower() == ".safetensors")
    if len(found) != 1:
        raise UserError(
            f"{path} holds {len(found) or 'no'} .safetensors files, and neither {LORA_FILE} nor {PEFT_FILE}. Name the "
            "LoRA's file."
        )
    return found[0]


def read_lora_file(path: Path, family: Family | None = None, *, allow_pickle: bool = False) -> LoraFile:
    """Read a LoRA's file, whatever model it is for.

    Args:
        path: its file or folder, see :func:`lora_file`.
        family: of the model that it is to go on, by which a full checkpoint that was passed for it is told.
    Raises: UserError: no readable LoRA; a relative that is not read; a layer with parts missing or of shapes that do
        not fit each other; values that are not finite; metadata that its scale depends on and that cannot be read.
    """
    path = lora_file(path)
    header = read_header(path, allow_pickle=allow_pickle)
    _check_is_lora(path, header.tensors, family)
    split_names(path, header.tensors)
    if any(name.startswith(BUNDLED) for name in header.tensors):
        _logger.warning("%s: the embedding that is bundled with the LoRA is left out.", path)
    config = _peft_config(path, header.metadata)
    tensors = read_tensors(path)
    check_finite({name: tensor for name, tensor in tensors.items() if not name.startswith(BUNDLED)}, str(path))
    return _file_of(path, tensors, config, header.metadata)


def _file_of(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | str, metadata: Mapping[str, str]
) -> LoraFile:
    names = split_names(path, tensors)
    for layer, parts in names.items():
        check_complete(path, layer, parts)
    layers = {}
    for layer, parts in names.items():
        found = _layer(path, layer, {part: tensors[key] for part, key in parts.items()}, config)
        if found is not None:
            layers[layer] = found
    dtypes = [tensors[key].dtype for parts in names.values() for part, key in parts.items() if part != "alpha"]
    return LoraFile(path, layers, max(set(dtypes), key=dtypes.count), metadata)


def _as_diffusers_names_it(file: LoraFile, family: Family) -> LoraFile:
    """A LoRA of a transformer whose layers have its authors' names, by diffusers' own converter; else as it is.

    Raises: UserError: the converter lost something of it.
    """
    tensors = read_tensors(file.path)
    try:
        converted = family.pipeline_class.lora_state_dict(dict(tensors))
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError, AttributeError, AssertionError):
        return file  # of another model, which is told by its layers
    converted = converted[0] if isinstance(converted, tuple) else converted
    # what lies in a row is taken apart, and scaled: the outputs' side keeps its numbers that are not 0
    before, after = (
        sum(int(tensor.count_nonzero()) for name, tensor in found.items() if ".lora_up." in name or ".lora_B." in name)
        for found in (tensors, converted)
    )
    if before != after:
        raise UserError(
            f"{file.path}: diffusers' converter keeps {after} of the {before} numbers of its layers' outputs. Convert "
            "it to diffusers' layout with the tool that it comes from; none of it is dropped quietly."
        )
    return _file_of(file.path, converted, {}, file.metadata)


def read_lora(
    path: Path,
    models: Mapping[str, Any],
    family: Family | None = None,
    *,
    allow_pickle: bool = False,
) -> list[LoraChange]:
    """Read a LoRA and check that all of it fits a model.

    Args:
        path: its file, or a folder that diffusers or PEFT saved one to.
        models: the denoiser and the text encoders by component, with weights or on the meta device.
        family: of the model; names of the original layout are known by it.
    Raises: UserError: see :func:`read_lora_file`; none or not all of its layers are the model's; shapes that do not
        fit.
    """
    file = read_lora_file(path, family, allow_pickle=allow_pickle)
    models = {name: model for name, model in models.items() if name != "vae"}
    known = layers_by_name(models, family)
    told_apart = family is None or all(name in known for name in file.layers)
    if family is not None and not told_apart and not family.denoiser.layout:
        file = _as_diffusers_names_it(file, family)
    elif family is not None and not told_apart:
        name = family.denoiser.name
        known = {**layers_by_original_name(name, original_names({name: models[name]}, family)[name]), **known}
    _check_known(file, known, family)
    changes = []
    for name, layer in file.layers.items():
        component, module = known[name]
        try:
            changes += _changes(file.path, name, layer, component, module, models[component].get_submodule(module))
        except UserError as error:
            title = _other_title(file, family)
            raise UserError(f"{error} It says that it is of {title}.") if title else error from error
    if title := _other_title(file, family):
        # names and shapes are facts of the weights; what trainers write beside them is wrong now and then
        _logger.warning("%s says that it is of %s; all of it fits this model, and is taken.", file.path, title)
    return changes


def _check_is_lora(path: Path, names: Mapping[str, Tensor], family: Family | None) -> None:
    if is_lora(names):
        return
    found = family_of_names(names)
    if found is not None:
        title = found[0].title
        advice = " Pass it as the model, without a LoRA." if family is None or title == family.title else ""
        raise UserError(f"{path} is a full checkpoint ({title}; it holds '{found[1]}'), not a LoRA.{advice}")
    example = next(iter(names), None)
    raise UserError(
        f"{path} is no LoRA: none of its {len(names)} tensors has a LoRA's name"
        f"{f', such as {example!r}' if example else ''}. Names such as 'lora_unet_....lora_down.weight' were expected."
    )


def _peft_config(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any] | str:
    """What PEFT says of the LoRA, in the header or beside the file; or why that cannot be read."""
    beside = path.parent / PEFT_CONFIG
    told, where = metadata.get(_METADATA), f"its metadata '{_METADATA}'"
    if told is None and path.name == PEFT_FILE and beside.is_file():
        told, where = beside.read_text(encoding="utf-8", errors="replace"), f"{PEFT_CONFIG} beside it"
    if told is None:
        return {}
    try:
        config = parse_json(told, where)
    except UserError as error:
        return str(error).rstrip(".")
    return config if isinstance(config, dict) else f"{where} is no mapping of names to settings"


def peft_scaling(config: Mapping[str, Any], layer: str, rank: int | None) -> float:
    """Read alpha / rank from PEFT's config; 1 where it does not say.

    Args:
        config: its keys perhaps with a component before them: ``unet.lora_alpha``.
        layer: the name that the file gives the layer.
        rank: of the layer, where its tensors tell.
    """
    component, _, module = layer.partition(".")
    prefix = f"{component}." if any(key.startswith(f"{component}.") for key in config) else ""
    module = module if prefix else layer.removeprefix("base_model.model.")

    def setting(name: str) -> Any:
        return config.get(prefix + name)

    def of_layer(pattern: str, default: Any) -> Any:
        by_name = setting(pattern)
        if not isinstance(by_name, dict) or not by_name:
            return default
        try:
            return by_name.get(get_pattern_key(list(by_name), module), default)
        except (re.error, TypeError, RecursionError) as error:
            raise UserError(f"its {pattern} holds patterns that cannot be read ({error})") from error

    if rank is None:
        rank = of_layer("rank_pattern", setting("r"))
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            return 1.0
    default = setting("lora_alpha") if setting("lora_alpha") is not None else setting("alpha")
    alpha = default if default is not None else rank
    alpha = of_layer("alpha_pattern", alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST_ALPHA:
        raise UserError(f"the alpha of '{layer}' is {str(alpha)[:40]}, expected a number")
    return float(alpha / rank**0.5) if setting("use_rslora") else alpha / rank


def _layer(path: Path, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any] | str) -> LoraLayer | None:
    """What the tensors of a layer say; None of a layer of rank 0, which says nothing."""
    if any(part in parts and not parts[part].numel() for part in ("down", "up")):
        return None
    form = _form(path, name, parts)
    bias = parts.get("whole_bias")
    scaling = 1.0
    rank = form.rank if form is not None else None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise UserError(f"{path}: the alpha of '{name}' is {parts['alpha'].numel()} numbers, expected one.")
        scaling = parts["alpha"].item() / rank if rank else 1.0
    elif form is not None and not isinstance(form, Whole):
        if isinstance(config, str):
            raise UserError(f"{path}: {config}, and no other place tells its scale (alpha). Download it again.")
        try:
            scaling = peft_scaling(config, name, rank)
        except UserError as error:
            raise UserError(f"{path}: {error}. Its settings are damaged; download it again.") from error
    if "up_bias" in parts:
        bias = parts["up_bias"].float() * scaling
    magnitude = parts.get("magnitude")
    if "magnitude_of_outputs" in parts:
        magnitude = parts["magnitude_of_outputs"].flatten()
    return LoraLayer(
        form, None if bias is None else bias.float(), scaling, None if magnitude is None else magnitude.float()
    )


def _form(path: Path, name: str, parts: Mapping[str, Tensor]) -> Form | None:
    # a LoRA of a large model is some gigabyte: low-rank factors stay in the file's dtype until they are computed with
    tensors = {part: tensor if part in ("down", "up") else tensor.float() for part, tensor in parts.items()}
    matrices = {
        part: tensor for part, tensor in tensors.items() if part in ("down", "up") or part[:5] in ("hada_", "lokr_")
    }
    for part, tensor in matrices.items():
        if tensor.ndim not in (2, 3, 4):
            raise UserError(
                f"{path}: the layer '{name}' has a {part} of shape {tuple(tensor.shape)}, expected a matrix or a "
                "convolution's weight. The file is damaged; download it again."
            )
    try:
        if "down" in tensors:
            form: Form = _low_rank(tensors["down"], tensors["up"], tensors.get("core"))
        elif "hada_w1_a" in tensors:
            form = Hadamard(*(_hadamard_factor(tensors, one) for one in ("1", "2")))
        elif any(part.startswith("lokr_") for part in tensors):
            form = _kronecker(tensors)
        elif "whole" in tensors:
            form = Whole(tensors["whole"])
        else:
            return None
    except (ValueError, RuntimeError) as error:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in tensors.items() if part != "alpha")
        raise UserError(
            f"{path}: the layer '{name}' has {shapes}, which do not fit each other. The file is damaged; download it "
            "again."
        ) from error
    return form


def _low_rank(down: Tensor, up: Tensor, core: Tensor | None) -> LowRank:
    rank = len(down)
    if up.flatten(1).shape[1] != rank:
        raise ValueError
    if core is not None and core.shape[:2] != (rank, rank):
        raise ValueError
    return LowRank(down, up, core)


def _hadamard_factor(tensors: Mapping[str, Tensor], one: str) -> LowRank:
    left, right, core = tensors[f"hada_w{one}_a"], tensors[f"hada_w{one}_b"], tensors.get(f"hada_t{one}")
    # with a core the outputs' side lies the other way round
    return _low_rank(right, left if core is None else left.T, core)


def _kronecker(tensors: Mapping[str, Tensor]) -> Kronecker:
    ranks = []

    def factor(name: str, core: Tensor | None) -> Tensor:
        if name in tensors:
            return tensors[name]
        left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
        ranks.append(len(right))
        if core is not None:
            return torch.einsum("pqhw,qi,po->oihw", core, right, left)
        return (left @ right.flatten(1)).reshape(len(left), *right.shape[1:])

    one, other = factor("lokr_w1", None), factor("lokr_w2", tensors.get("lokr_t2"))
    return Kronecker(one.flatten(1), other, ranks[-1] if ranks else None)


def _other_title(file: LoraFile, family: Family | None) -> str | None:
    """What a LoRA says that it is of, where that is not the family."""
    title = title_of_lora(file.layers, file.metadata)
    return None if title is None or (family is not None and family.title in title) else title


def _check_known(file: LoraFile, layers: Mapping[str, object], family: Family | None) -> None:
    path, names = file.path, list(file.layers)
    unknown = [name for name in names if name not in layers]
    if not unknown:
        return
    title = _other_title(file, family)
    if len(unknown) == len(names):
        kind = f"It is of {title}; pass a LoRA made for this one" if title else "Pass a LoRA made for this model"
        raise UserError(
            f"{path}: none of its {len(names)} layers is one of this model's: it has '{unknown[0]}', the model "
            f"'{next(iter(layers))}'. {kind}."
        )
    told = f"It is of {title}" if title else "It was made for another model, or is of a layout that is not known here"
    raise UserError(
        f"{path}: {len(unknown)} of its {len(names)} layers are not this model's: "
        f"{', '.join(repr(name) for name in unknown[:3])}{', ...' if len(unknown) > 3 else ''}. "
        f"{told}; none of it is dropped quietly."
    )


def _changes(path: Path, name: str, layer: LoraLayer, component: str, module: str, target: Any) -> list[LoraChange]:
    """A layer's changes, held against the model's own layer."""
    changes = []
    if layer.form is not None:
        weight, form = target.weight, layer.form
        fits = form.num_rows == len(weight) and form.num_columns == weight[0].numel()
        if not fits or not (is_layer(target) or isinstance(form, Whole)):
            raise UserError(
                f"{path}: the layer '{name}' changes a weight of {form.num_rows} x {form.num_columns}, the model's is "
                f"{tuple(weight.shape)}. It was trained on another architecture; pass that model as the base."
            )
        if layer.magnitude is not None and layer.magnitude.numel() not in (len(weight), weight.shape[1]):
            raise UserError(
                f"{path}: the layer '{name}' has a magnitude (DoRA) of {tuple(layer.magnitude.shape)}, the model's "
                f"weight is {tuple(weight.shape)}. The file is damaged, or was trained on another architecture."
            )
        magnitude = None if layer.magnitude is None else _oriented(layer.magnitude, weight)
        changes.append(LoraChange(component, module, "weight", form, layer.scaling, magnitude))
    if layer.bias is not None:
        bias = getattr(target, "bias", None)
        if bias is None:  # PEFT trains one on any layer, and cannot merge it either
            raise UserError(
                f"{path}: the layer '{name}' changes a bias, and the model's layer has none that the change could be "
                "merged into. Train the LoRA without biases (lora_bias: false)."
            )
        if bias.shape != layer.bias.shape:
            raise UserError(
                f"{path}: the layer '{name}' changes a bias of {tuple(layer.bias.shape)}, the model's is "
                f"{tuple(bias.shape)}. It was trained on another architecture; pass that model as the base."
            )
        changes.append(LoraChange(component, module, "bias", Whole(layer.bias)))
    return changes


def _oriented(magnitude: Tensor, weight: Tensor) -> Tensor:
    """Norms of outputs as (out,), of inputs as (1, in)."""
    by_output = magnitude.shape[0] == len(weight)
    return magnitude.flatten() if by_output else magnitude.reshape(1, -1)
