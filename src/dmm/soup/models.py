"""Models as named tensors to be read in slices, whatever layout they are kept in."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Component, Family, Stranger, family_of_names
from dmm.formats.ema import choose_weights, has_average_beside
from dmm.formats.folder import UNUSED_COMPONENTS, check_configs, family_of_folder, tell_folder, weight_files
from dmm.formats.lora import LoraChange, is_lora
from dmm.formats.schedules import MARKS, read_scheduler_config, said_of_schedule
from dmm.formats.single_file import (
    HARMLESS,
    is_vae_attention,
    original_names,
    prediction_type_of,
)
from dmm.formats.stock_files import read_index
from dmm.formats.tensors import Header
from dmm.soup.reading import WeightFile

Layout = Literal["file", "folder"]
"""A single file of the original layout; or a diffusers folder, whose tensors are ``component/name``."""

TEXT_ENCODERS = ("text_encoder", "cond_stage_model.", "conditioner.embedders.")
"""What text encoders' tensors' names begin with."""

_VAE_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Source:
    """Where one tensor of a model is read from."""

    file: WeightFile
    name: str
    """In the file."""
    shape: tuple[int, ...]
    """In the layout that it is read for; its elements' order is the same in all."""
    added: tuple[tuple[LoraChange, float], ...] = ()
    """LoRAs on this layer, and how strongly."""

    @property
    def dtype(self) -> torch.dtype:
        """In the file."""
        return self.file.tensors[self.name].dtype

    @property
    def num_elements(self) -> int:
        """How many."""
        return torch.Size(self.shape).numel()

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some elements, flattened; a slice of a LoRA's product is computed from the rows that it takes."""
        if any(change.magnitude is not None for change, _ in self.added):
            return self._read_whole(dtype).flatten()[start:stop]
        values = self.file.read(self.name, start, stop, dtype)
        for change, scale in self.added:
            columns = change.form.num_columns
            first, last = start // columns, -(-stop // columns)
            delta = change.rows(first, last, dtype).flatten()
            values.add_(delta[start - first * columns : stop - first * columns], alpha=scale)
        return values

    def _read_whole(self, dtype: torch.dtype) -> Tensor:
        """All of it: a magnitude is of whole rows and columns."""
        weight = self.file.read(self.name, 0, self.num_elements, dtype).reshape(self.shape)
        for change, scale in self.added:
            weight = change.changed(weight, scale)
        return weight


@dataclass(frozen=True)
class OpenModel:
    """A model whose files are open and whose headers are checked."""

    label: str
    """What error messages call it."""
    path: Path
    layout: Layout
    family: Family | Stranger
    prediction_type: str
    scheduler: Mapping[str, Any]
    """A folder's scheduler config; of a single file, what it says of its noise schedule."""
    tensors: dict[str, Source]
    files: dict[str, WeightFile]
    """By their paths within a folder; of a single file, by its name."""
    loras: tuple[Path, ...] = ()
    """The files of the LoRAs on it."""
    leaves_average: bool = False
    """Whether its file has an EMA copy of the weights, which is not read."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Of its main file."""
        return next(iter(self.files.values())).metadata


def open_model(path: Path, label: str, *, ema: bool = False) -> OpenModel:
    """Open a model's files and check their headers.

    Args:
        ema: of a single file, see :func:`dmm.formats.ema.choose_weights`.
    Raises: UserError: damaged files, pickles, or no model of a family that we know; it begins with ``label``.
    """
    try:
        return _open_folder(path, label, ema) if path.is_dir() else _open_file(path, label, ema)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error


@dataclass(frozen=True)
class Names:
    """What the two layouts call the same tensors, as one model's configs have it."""

    config: Path
    skeletons: dict[str, Any]
    file_of_folder: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Path) -> "Names":
        """Read them off a stock pipeline folder's configs.

        Raises: UserError: it is no stock folder, or of a family whose layouts we cannot translate.
        """
        family = family_of_folder(config)
        skeletons = check_configs(config, family)
        names = {
            f"{component}/{_with_level(component, ours)}": theirs
            for component, by_name in original_names(skeletons, family).items()
            for ours, theirs in by_name.items()
        }
        return cls(config, skeletons, names)

    def parameter(self, layout: Layout, component: str, module: str, parameter: str) -> str:
        """What a layout calls a layer's weight or bias."""
        name = f"{component}/{_with_level(component, module)}.{parameter}"
        return name if layout == "folder" else self.file_of_folder[name]


def translate(model: OpenModel, layout: Layout, names: Names) -> OpenModel:
    """A model's tensors by the names of another layout; what nothing reads is left behind.

    Raises: UserError: it has tensors that the other layout has no name for, or other shapes than the configs.
    """
    if model.layout == layout:
        return model
    forward = names.file_of_folder
    table = forward if layout == "file" else {theirs: ours for ours, theirs in forward.items()}
    tensors = {}
    for name, source in model.tensors.items():
        if name not in table:
            if any(fnmatchcase(name, f"*{known}") for known in (*HARMLESS, "/logit_scale", "/text_projection.weight")):
                continue
            raise UserError(
                f"{model.label}: {model.path} has '{name}', for which the other layout has no name. Merge models of "
                f"the architecture of {names.config}, or give another config."
            )
        shape = source.shape
        if is_vae_attention(forward.get(name, name)):
            shape = (*shape[:2], 1, 1) if layout == "file" else shape[:2]
        tensors[table[name]] = replace(source, shape=shape)
    return replace(model, layout=layout, tensors=tensors)


def put_lora(model: OpenModel, changes: Sequence[LoraChange], path: Path, scale: float, names: Names) -> OpenModel:
    """A model with a LoRA on it.

    Args:
        changes: as ``read_lora`` has checked them.
    """
    tensors = dict(model.tensors)
    for change in changes:
        name = names.parameter(model.layout, change.component, change.module, change.parameter)
        source = tensors.get(name)
        if source is None:
            raise UserError(f"{model.label}: {model.path} has no '{name}', which the LoRA {path} changes.")
        tensors[name] = replace(source, added=(*source.added, (change, scale)))
    return replace(model, tensors=tensors, loras=(*model.loras, path))


def _open_file(path: Path, label: str, ema: bool) -> OpenModel:
    file = WeightFile(path)
    chosen = choose_weights(path, file.in_order(), ema=ema)
    names = list(chosen)
    if is_lora(names):
        raise UserError(f"{path} is a LoRA, not a full model. Pass it as lora: instead of model:.")
    found = family_of_names(names)
    if found is None:
        example = f", such as '{names[0]}'" if names else ""
        raise UserError(
            f"{path}: none of its {len(names)} tensors has a name that we know{example}. Pass a single file of the "
            "original layout, or a pipeline folder."
        )
    header = Header(file.tensors, file.metadata)
    prediction_type = prediction_type_of(path, header) or "epsilon"
    tensors = {
        name: Source(file, kept, tuple(file.tensors[kept].shape)) for name, kept in chosen.items() if name not in MARKS
    }
    return OpenModel(
        label,
        path,
        "file",
        found[0],
        prediction_type,
        said_of_schedule(path, header),
        tensors,
        {path.name: file},
        leaves_average=not ema and has_average_beside(file.tensors),
    )


def _open_folder(path: Path, label: str, ema: bool) -> OpenModel:
    if ema:
        raise UserError(f"{path} is a folder, which has no EMA copy of its weights. Take it without ema.")
    if not (path / "model_index.json").is_file():
        raise UserError(
            f"{path} holds no model_index.json, so it is no stock diffusers pipeline folder. Pass the folder that "
            "`save_pretrained` of a pipeline wrote, or a single .safetensors file."
        )
    index = read_index(path)
    family = tell_folder(path)
    files: dict[str, WeightFile] = {}
    tensors: dict[str, Source] = {}
    # the UNet first: its file is the one whose metadata tell of the whole
    for name in sorted(index, key=lambda name: (name != "unet", name)):
        at = path / name
        stem = "model" if name.startswith(TEXT_ENCODERS[0]) else "diffusion_pytorch_model"
        foreign = isinstance(family, Family) and name not in {one.name for one in family.components}
        if foreign or name in UNUSED_COMPONENTS or not (at / "config.json").is_file():
            continue
        for weights in weight_files(at, Component(name, None, "", stem), allow_pickle=False)[0]:
            file = files[os.path.relpath(weights, path).replace(os.sep, "/")] = WeightFile(weights)
            for key in file.in_order():
                tensors[f"{name}/{_current(name, key)}"] = Source(file, key, tuple(file.tensors[key].shape))
    if not any(name.startswith("unet/") for name in tensors):
        raise UserError(f"{path} has no UNet. Pass a whole pipeline folder.")
    scheduler = read_scheduler_config(path)
    prediction_type = str(scheduler.get("prediction_type", "epsilon"))
    return OpenModel(label, path, "folder", family, prediction_type, scheduler, tensors, files)


def _current(component: str, name: str) -> str:
    """A tensor's name in its component's newest files; older files have older ones."""
    if component == "vae":
        for old, new in _VAE_ATTENTION.items():
            name = name.replace(old, new)
    return _with_level(component, name)


def _with_level(component: str, name: str) -> str:
    # the level that transformers 5.6 dropped from the class is kept in the files
    if (
        component != "text_encoder"
        or name.startswith("text_model.")
        or name in ("logit_scale", "text_projection.weight")
    ):
        return name
    return f"text_model.{name}"


def is_harmless(name: str) -> bool:
    """Whether nothing that samples reads a tensor of this name."""
    return any(fnmatchcase(name, f"*{known}") for known in HARMLESS)
