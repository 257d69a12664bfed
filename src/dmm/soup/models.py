"""Models as named tensors to be read in slices, whatever layout they are kept in."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dmm.errors import UserError
from dmm.families import Component, Family, Stranger, denoiser_names, family_of_names, transformer_of
from dmm.formats.ema import choose_weights, has_average_beside
from dmm.formats.folder import UNUSED_COMPONENTS, check_configs, family_of_folder, tell_folder, weight_files
from dmm.formats.lora import LoraChange, is_lora
from dmm.formats.original_layout import MARKS, Place, is_unread, original_places
from dmm.formats.schedules import predicted, read_scheduler_config, said_of_schedule
from dmm.formats.single_file import prediction_type_of
from dmm.formats.stock_files import read_index
from dmm.formats.tensors import Header
from dmm.formats.transformer_files import common_prefix
from dmm.soup.reading import WeightFile
from dmm.soup.sources import Change, Changed, Joined, Kept, Source, Turned, split

Layout = Literal["file", "folder"]
"""A single file of the original layout; or a diffusers folder, whose tensors are ``component/name``."""

TEXT_ENCODERS = ("text_encoder", "cond_stage_model.", "conditioner.embedders.")
"""What text encoders' tensors' names begin with."""

_LEVEL = "text_model."
_BELOW_IT = ("embeddings.", "encoder.layers.", "final_layer_norm.")
_VAE_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class OpenModel:
    """A model whose files are open and whose headers are checked."""

    label: str
    """What error messages call it."""
    path: Path
    layout: Layout
    family: Family | Stranger
    prediction_type: str | None
    """None of a single file that does not say, of a family whose files need not."""
    scheduler: Mapping[str, Any]
    """A folder's scheduler config; of a single file, what it says of its noise schedule."""
    tensors: dict[str, Source]
    files: dict[str, WeightFile]
    """By their paths within a folder; of a single file, by its name."""
    loras: tuple[Path, ...] = ()
    """The files of the LoRAs on it."""
    leaves_average: bool = False
    """Whether its file has an EMA copy of the weights, which is not read."""
    prefix: str = ""
    """Of a transformer's single file: what stands before all names there, and before none of ``tensors``."""

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
    """Where the two layouts keep the same tensors, as one model's configs have it."""

    config: Path
    family: Family
    skeletons: dict[str, Any]
    places: dict[str, Place] = field(default_factory=dict)
    """In a single file, by the names that a folder's tensors have."""

    @classmethod
    def of(cls, config: Path) -> "Names":
        """Read them off a stock pipeline folder's configs.

        Raises: UserError: it is no stock folder, or of a family whose layouts we cannot translate.
        """
        family = family_of_folder(config)
        skeletons = check_configs(config, family, only_names=True)
        places = {
            f"{component}/{_with_level(component, ours)}": place
            for component, by_name in original_places(skeletons, family).items()
            for ours, place in by_name.items()
        }
        return cls(config, family, skeletons, places)


def translate(model: OpenModel, layout: Layout, names: Names) -> OpenModel:
    """A model's tensors by the names, and in the form, of another layout; what nothing reads is left behind.

    Raises: UserError: it has tensors that the other layout has no place for, or a part only of what is one there.
    """
    if model.layout == layout:
        return model
    known = names.places.keys() if layout == "file" else {place.name for place in names.places.values()}
    for name in model.tensors:
        if name not in known and not is_unread(name, names.family):
            raise UserError(
                f"{model.label}: {model.path} has '{name}', for which the other layout has no name. Merge models of "
                f"the architecture of {names.config}, or give another config."
            )
    tensors = _to_file(model, names) if layout == "file" else _to_folder(model, names)
    return replace(model, layout=layout, tensors=tensors)


def _to_folder(model: OpenModel, names: Names) -> dict[str, Source]:
    tensors = {}
    for name, place in names.places.items():
        kept = model.tensors.get(place.name)
        if kept is None:
            continue
        if place.num_parts > 1:
            tensors[name] = _parts(model, place, kept)[place.part]
        elif place.is_convolution and isinstance(kept, Kept):
            tensors[name] = replace(kept, shape=kept.shape[:2])
        else:
            tensors[name] = Turned(kept) if place.is_turned else kept
    return tensors


def _to_file(model: OpenModel, names: Names) -> dict[str, Source]:
    tensors: dict[str, Source] = {}
    parts: dict[str, dict[int, Source]] = {}
    for name, place in names.places.items():
        kept = model.tensors.get(name)
        if kept is None:
            continue
        if place.num_parts > 1:
            parts.setdefault(place.name, {})[place.part] = kept
        elif place.is_convolution and isinstance(kept, Kept):
            tensors[place.name] = replace(kept, shape=(*kept.shape[:2], 1, 1))
        else:
            tensors[place.name] = Turned(kept) if place.is_turned else kept
    for name, place in names.places.items():
        if place.name not in parts:
            continue
        found = parts[place.name]
        if len(found) < place.num_parts:
            if place.part not in found:
                raise UserError(
                    f"{model.label}: {model.path} lacks '{name}', which lies in one tensor with others in a single "
                    "file. The folder is incomplete; get another copy."
                )
            continue
        if len({source.shape for source in found.values()}) > 1:
            raise UserError(
                f"{model.label}: {model.path}: '{name}' is of another shape than what lies in one tensor with it in a "
                "single file. Get another copy."
            )
        tensors[place.name] = Joined(tuple(found[part] for part in sorted(found)))
    return tensors


def _parts(model: OpenModel, place: Place, kept: Source) -> Sequence[Source]:
    try:
        return split(kept, place.num_parts)
    except ValueError as error:
        raise UserError(
            f"{model.label}: {model.path}: '{place.name}' has shape {kept.shape}, where {place.num_parts} of one shape "
            "lie in a row. Get another copy."
        ) from error


def put_lora(model: OpenModel, changes: Sequence[LoraChange], path: Path, scale: float, names: Names) -> OpenModel:
    """A model with a LoRA on it.

    Args:
        changes: as ``read_lora`` has checked them.
    Raises: UserError: it has no such layer.
    """
    tensors = dict(model.tensors)
    for change in changes:
        ours = f"{change.component}/{_with_level(change.component, f'{change.module}.{change.parameter}')}"
        # of transformers, only folders get here: no other layout has names for them
        name = ours if model.layout == "folder" else names.places[ours].name
        kept = tensors.get(name)
        if kept is None:
            raise UserError(f"{model.label}: {model.path} has no '{name}', which the LoRA {path} changes.")
        if model.layout == "folder":
            tensors[name] = _changed(kept, change, scale)
            continue
        place = names.places[ours]
        if place.num_parts > 1:
            parts = [*_parts(model, place, kept)]
            parts[place.part] = _changed(parts[place.part], change, scale)
            tensors[name] = Joined(tuple(parts))
        elif place.is_turned:
            # the change is of the layer as the model's class has it
            tensors[name] = Turned(_changed(Turned(kept), change, scale))
        else:
            tensors[name] = _changed(kept, change, scale)
    return replace(model, tensors=tensors, loras=(*model.loras, path))


def _changed(kept: Source, change: LoraChange, scale: float) -> Changed:
    before = kept if isinstance(kept, Changed) else Changed(kept, ())
    return replace(before, changes=(*before.changes, Change(change, scale)))


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
    prediction_type = prediction_type_of(path, header) or found[0].predicts
    prefix = common_prefix(chosen) if transformer_of(found[0]) else ""
    tensors: dict[str, Source] = {
        name.removeprefix(prefix): Kept(file, kept, tuple(file.tensors[kept].shape))
        for name, kept in chosen.items()
        if name not in MARKS
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
        prefix=prefix,
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
    known = [family.denoiser.name] if isinstance(family, Family) else denoiser_names()
    # the denoiser first: its file is the one whose metadata tell of the whole
    for name in sorted(index, key=lambda name: (name not in known, name)):
        at = path / name
        stem = "model" if name.startswith(TEXT_ENCODERS[0]) else "diffusion_pytorch_model"
        foreign = isinstance(family, Family) and name not in {one.name for one in family.components}
        if foreign or name in UNUSED_COMPONENTS or not (at / "config.json").is_file():
            continue
        for weights in weight_files(at, Component(name, None, "", stem), allow_pickle=False)[0]:
            file = files[os.path.relpath(weights, path).replace(os.sep, "/")] = WeightFile(weights)
            for key in file.in_order():
                tensors[f"{name}/{_current(name, key)}"] = Kept(file, key, tuple(file.tensors[key].shape))
    if not any(name.startswith(tuple(f"{one}/" for one in known)) for name in tensors):
        raise UserError(f"{path} has no weights of a {' or '.join(known)}. Pass a whole pipeline folder.")
    scheduler = read_scheduler_config(path)
    prediction_type = predicted(scheduler)
    return OpenModel(label, path, "folder", family, prediction_type, scheduler, tensors, files)


def _current(component: str, name: str) -> str:
    """A tensor's name in its component's newest files; older files have older ones."""
    if component == "vae":
        for old, new in _VAE_ATTENTION.items():
            name = name.replace(old, new)
    return _with_level(component, name)


def _with_level(component: str, name: str) -> str:
    # the level that transformers 5.6 dropped from one class of text encoders is kept in the files
    below = component.startswith("text_encoder") and name.startswith(_BELOW_IT)
    return f"{_LEVEL}{name}" if below else name
