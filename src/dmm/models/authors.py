"""The layout in which DMM's authors released their merged models: read and written.

Their UNet holds the side-car itself. In its state dict stand ``model_embedding.weight``, the (N, D) codebook, and
``add_embedding.linear_{1,2}.{weight,bias}``, the MLP; in its config, ``addition_embed_type: model_merge`` and
``num_models``; and the classes are named for it. Where a stock UNet has an ``add_embedding`` of its own, theirs has
another name (see :class:`dmm.families.family.AuthorsLayout`). No stock library opens that, so the parts are told apart
here. A single file has the same five tensors beside those of the original layout. Their styles have numbers for names.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTokenizer

from dmm.errors import UserError
from dmm.families import FAMILIES, Family, Stranger, family_of, family_of_names, known_titles
from dmm.families.family import AuthorsLayout
from dmm.files.json import parse_json, read_json
from dmm.formats.building import building, check_config, check_tokenizer
from dmm.formats.configs import find_configs
from dmm.formats.folder import check_component, open_scaled, weight_files, without_unused
from dmm.formats.schedules import open_scheduler, read_scheduler_config
from dmm.formats.single_file import check_single_file, open_single_file, scheduler_config_of
from dmm.formats.skeleton import build_skeleton, check_tensors
from dmm.formats.stock_files import INDEX
from dmm.formats.tensors import Header, check_finite, read_header, read_tensors, write_tensors
from dmm.models.style_names import CODEBOOK
from dmm.models.styles import Provenance, StylePrompts

UNET_CLASS = "DMMUNet2DConditionModel"
UNET_MODULE = "modeling.dmm_unet"
"""Where the authors' code finds the class, as their model_index.json says."""
STYLES_KEY = "dmm.models.styles"
"""Of the metadata of a weight file that we wrote: the styles by name, and where each came from, as JSON."""

_PARAMETERS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")


def is_authors(path: Path, *, allow_pickle: bool = False) -> bool:
    """Whether a path holds a merged model in the authors' layout, a folder or a single file."""
    if path.is_dir():
        index = path / "model_index.json"
        return index.is_file() and read_json(index).get("_class_name") in [
            one.authors.pipeline for one in FAMILIES.values() if one.authors
        ]
    return any(name.endswith(CODEBOOK) for name in read_header(path, allow_pickle=allow_pickle).tensors)


def read_authors_styles(path: Path, *, allow_pickle: bool = False) -> StylePrompts:
    """Read the style prompts of what :func:`is_authors`, in float32.

    Raises: UserError: it is of a family that does not open; a file is missing or damaged; or the parts do not fit.
    """
    known = _names(_family_of(path, allow_pickle))
    tensors, metadata = _side_car(path, _denoiser_files(path, allow_pickle), known, allow_pickle)
    num_styles, dim = tensors["embeddings"].shape
    provenance = _read_provenance(path, metadata, num_styles)
    names = [one["name"] for one in provenance] if provenance else [str(i) for i in range(num_styles)]
    with torch.device("meta"):
        skeleton = StylePrompts(names, dim)
    check_tensors(skeleton, tensors, str(path), {ours: theirs for theirs, ours in known.items()})
    check_finite(tensors, str(path))
    prompts: StylePrompts = skeleton.to_empty(device="cpu")
    prompts.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    if provenance and all(len(one) > 1 for one in provenance):
        prompts.provenance = [Provenance(**one) for one in provenance]
    return prompts


def open_authors(path: Path, *, config: Path | None, torch_dtype: torch.dtype, allow_pickle: bool = False) -> Any:
    """Load the stock part of what :func:`is_authors`: a pipeline that paints the style-less average.

    Args:
        config: the stock pipeline folder whose configs a single file follows, by default as ``find_configs`` has it.
    Raises: UserError: a file is missing or damaged, or the parts do not fit.
    """
    if path.is_dir():
        pipeline = _open_folder(path, torch_dtype, allow_pickle)
    else:
        header = read_header(path, allow_pickle=allow_pickle)
        family = _family_of(path, allow_pickle)
        stock = {name: tensor for name, tensor in header.tensors.items() if not name.endswith(tuple(_names(family)))}
        header = Header(stock, header.metadata)
        config = config or find_configs(path, header, family)
        check_single_file(path, header, config, family)
        pipeline = open_single_file(path, family, config=config, torch_dtype=torch_dtype)
        pipeline.scheduler = open_scheduler(scheduler_config_of(path, header, config))
    for component in family_of(pipeline).components:
        check_finite(getattr(pipeline, component.name).state_dict(), f"{path}: {component.name}")
    return pipeline


def authors_layout(family: Family) -> AuthorsLayout:
    """How they released models of a family.

    Raises: UserError: they released none.
    """
    if family.authors is None:
        raise UserError(f"DMM's authors released no {family.title} model, so that there is no layout of theirs for it.")
    return family.authors


def _names(family: Family) -> dict[str, str]:
    """The side-car's own names, by theirs."""
    return {CODEBOOK: "embeddings"} | {f"{authors_layout(family).mlp}.{name}": name for name in _PARAMETERS}


def rewrite_folder(folder: Path, prompts: StylePrompts, family: Family) -> None:
    """Turn a stock pipeline folder, in place, into one of the authors' layout with these styles.

    Raises: UserError: of a family that they released nothing of.
    """
    authors, name = authors_layout(family), family.denoiser.name
    _edit_json(folder / "model_index.json", {"_class_name": authors.pipeline, name: [UNET_MODULE, UNET_CLASS]})
    _edit_json(
        folder / name / "config.json",
        {"_class_name": UNET_CLASS, "addition_embed_type": authors.embed_type, "num_models": len(prompts.names)},
    )
    (file,) = _denoiser_files(folder, allow_pickle=False)
    rewrite_file(file, prompts, family, prefix="")


def rewrite_file(file: Path, prompts: StylePrompts, family: Family, prefix: str) -> None:
    """Add the side-car to a file of a denoiser's weights, in place, and tell of the styles in its metadata.

    Args:
        prefix: of the denoiser's tensors there.
    Raises: UserError: of a family that they released nothing of.
    """
    names = _names(family)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    dtype = next(tensor.dtype for name, tensor in tensors.items() if name.startswith(prefix))
    ours = prompts.state_dict()
    tensors |= {prefix + theirs: ours[name].to(dtype) for theirs, name in names.items()}
    styles = [asdict(one) for one in prompts.provenance] or [{"name": name} for name in prompts.names]
    write_tensors(file, tensors, metadata | {STYLES_KEY: json.dumps(styles, ensure_ascii=False)})


def _open_folder(folder: Path, torch_dtype: torch.dtype, allow_pickle: bool) -> Any:
    family = _family_of(folder, allow_pickle)
    denoiser, *others = family.components
    for component in others:
        at = folder / component.name
        check_component(at, component, build_skeleton(at, component, family), allow_pickle=allow_pickle)
    path, kind = folder / denoiser.name / "config.json", denoiser.model_class
    stock = {name: value for name, value in read_json(path).items() if name != "num_models"}
    stock["addition_embed_type"] = authors_layout(family).stock_embed_type
    check_config(stock, path, kind)
    with building(f"{path} describes no {denoiser.title}"), torch.device("meta"):
        model = kind.from_config(stock | {"_class_name": kind.__name__})
    tensors: dict[str, Tensor] = {}
    for file in _denoiser_files(folder, allow_pickle):
        read_header(file, allow_pickle=allow_pickle)
        tensors |= {name: tensor for name, tensor in read_tensors(file).items() if name not in _names(family)}
    check_tensors(model, tensors, str(folder / denoiser.name))
    model.load_state_dict({name: tensor.to(torch_dtype) for name, tensor in tensors.items()}, assign=True)
    parts: dict[str, Any] = {denoiser.name: model.eval()}
    # one by one: diffusers refuses a pipeline folder that names a class of a library that it does not know
    for component in others:
        at = folder / component.name
        part = open_scaled(at, component, torch_dtype=torch_dtype, allow_pickle=allow_pickle)
        if part is None:
            with building(f"{at} cannot be opened"):
                part = component.model_class.from_pretrained(
                    at,
                    variant=weight_files(at, component, allow_pickle)[1],
                    use_safetensors=None if allow_pickle else True,
                    local_files_only=True,
                ).to(torch_dtype)
        parts[component.name] = part
    parts["scheduler"] = open_scheduler(read_scheduler_config(folder))
    for tokenizer, reader in family.tokenizers.items():
        check_tokenizer(folder / tokenizer, parts[reader].config)
        with building(f"{folder / tokenizer} holds no tokenizer that can be opened"):
            parts[tokenizer] = CLIPTokenizer.from_pretrained(folder / tokenizer, local_files_only=True)
    takes = inspect.signature(family.pipeline_class.__init__).parameters
    settings = {name: value for name, value in read_json(folder / INDEX).items() if isinstance(value, bool)}
    settings = {name: value for name, value in settings.items() if name in takes}
    return family.pipeline_class(**parts, **{**settings, **without_unused(family)})


def _denoiser_files(path: Path, allow_pickle: bool) -> list[Path]:
    if not path.is_dir():
        return [path]
    denoiser = _family_of(path, allow_pickle).denoiser
    return weight_files(path / denoiser.name, denoiser, allow_pickle)[0]


def _family_of(path: Path, allow_pickle: bool) -> Family:
    """The family of a merge in the authors' layout.

    Raises: UserError: none that opens.
    """
    told: Family | Stranger | None
    if path.is_dir():
        released = [one for one in FAMILIES.values() if one.authors]
        types = {one.name: _embed_type(path, one) for one in released}
        told = next((one for one in released if one.authors and one.authors.embed_type == types[one.name]), None)
        kind = f"of addition_embed_type {next(iter(types.values()))}"
    else:
        names = [name for name in read_header(path, allow_pickle=allow_pickle).tensors if CODEBOOK not in name]
        told, kind = (family_of_names(names) or (None,))[0], "of no family that we know"
    if not isinstance(told, Family) or told.authors is None:
        kind = told.title if told else kind
        raise UserError(f"{path}: this merge in the authors' layout is {kind}; {known_titles()} was expected.")
    return told


def _embed_type(folder: Path, family: Family) -> Any:
    return read_json(folder / family.denoiser.name / "config.json").get("addition_embed_type")


def _side_car(
    path: Path, files: list[Path], names: Mapping[str, str], allow_pickle: bool
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The side-car's tensors by our names, and the metadata of the file that holds the codebook."""
    found: dict[str, Tensor] = {}
    metadata: Mapping[str, str] = {}
    for file in files:
        header = read_header(file, allow_pickle=allow_pickle)
        theirs = {name: names[key] for name in header.tensors for key in names if name.endswith(key)}
        if theirs and file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:  # five of gigabytes
                found |= {ours: tensors.get_tensor(name) for name, ours in theirs.items()}
        elif theirs:
            pickled = read_tensors(file)
            found |= {ours: pickled[name] for name, ours in theirs.items()}
        if any(name.endswith(CODEBOOK) for name in theirs):
            metadata = header.metadata
    if "embeddings" not in found or found["embeddings"].ndim != 2:
        raise UserError(f"{path} has no '{CODEBOOK}' of two dimensions. The file is incomplete; download it again.")
    return found, metadata


def _read_provenance(path: Path, metadata: Mapping[str, str], num_styles: int) -> list[dict[str, str]]:
    """What a file that we wrote says of its styles; empty for the authors' own."""
    try:
        found = parse_json(metadata.get(STYLES_KEY, "[]"), "it")
        names = [one["name"] for one in found]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: its metadata '{STYLES_KEY}' cannot be read. Export the model again.") from error
    if found and len(set(names)) != num_styles:
        raise UserError(
            f"{path}: its metadata '{STYLES_KEY}' names {len(set(names))} styles, its codebook has {num_styles}. "
            "Export the model again."
        )
    return found


def _edit_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(read_json(path) | changes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
