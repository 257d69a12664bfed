"""Adapters on disk, in ``styles/`` of a merged model: ordinary files that other tools read, and an index.

    styles/NAME.safetensors        the low-rank part: a LoRA in kohya's layout, which diffusers, too, loads; of
                                   transformers in diffusers' own
           NAME.diff.safetensors   the differences of biases and norms, in the layout that ComfyUI and LyCORIS read;
                                   of a text encoder also those of its embeddings, low-rank, which no LoRA is read with
           adapters.json           which files a style has, their sha256, and that of the weights that they change

A style's files say nothing of other styles. Their headers name every parameter in full, which kohya's names do not.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Family, transformer_of
from dmm.files.digest import sha256
from dmm.files.json import parse_json, read_json
from dmm.formats.lora import in_files, kohya_name
from dmm.formats.tensors import check_finite, read_header, read_tensors, write_tensors
from dmm.models.adapters import Adapter, Factors

INDEX = "adapters.json"

_NAMES = "dmm.parameters"
_IN = "/"
"""Between a text encoder's component and its parameter, in a header; a denoiser's parameters stand alone."""
_WITH_LORAS = "encoder.layers."
"""Where in a text encoder tools look for low-rank changes: not at its embeddings, or its projection."""
# of a parameter's name, what stands for it in the layouts that carry whole differences
_ENDINGS = {"weight": "diff", "bias": "diff_b"}


class StoredAdapters(Mapping[str, Adapter]):
    """The adapters of a merged model, by style; read when they are asked for, then kept.

    Args:
        folder: ``styles/``.
    Raises: UserError: the index, or later a file, is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files, self.base_sha256 = _read_index(folder / INDEX)
        self._read: dict[str, Adapter] = {}

    def __getitem__(self, style: str) -> Adapter:
        if style not in self._read:
            for file, digest in self._files[style].items():
                path = self._folder / file
                if not path.is_file() or sha256(path) != digest:
                    raise UserError(
                        f"{path} is {'damaged' if path.is_file() else 'missing'}: {INDEX} beside it tells of another "
                        "file. Copy the whole folder again."
                    )
            self._read[style] = read_adapter([self._folder / file for file in self._files[style]])
        return self._read[style]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_adapters(folder: Path) -> Mapping[str, Adapter]:
    """The adapters in a ``styles/`` folder, by style; none where it has no index.

    Raises: UserError: the index is damaged.
    """
    return StoredAdapters(folder) if (folder / INDEX).is_file() else {}


def write_adapters(
    adapters: Mapping[str, Adapter],
    folder: Path,
    *,
    base_sha256: str,
    metadata: Mapping[str, Mapping[str, str]],
    component: str,
    family: Family,
) -> None:
    """Write the adapters of styles, and their index, into a ``styles/`` folder.

    Args:
        adapters: by style; each tensor is written in its dtype.
        base_sha256: of the weights that they change.
        metadata: by style, further strings for the headers.
        component: of a pipeline, that they change: no other's layers are taken for its.
        family: of the pipeline, by which several text encoders are told apart.
    Raises: UserError: a value is not finite.
    """
    folder.mkdir(exist_ok=True)
    index: dict[str, Any] = {}
    for (style, adapter), stem in zip(adapters.items(), file_stems(list(adapters)), strict=True):
        told = {**metadata.get(style, {}), "dmm.base_sha256": base_sha256}
        files = write_adapter(adapter, folder, stem, told, component, family)
        index[style] = {
            "files": {path.name: sha256(path) for path in files},
            "parameters": adapter.num_parameters,
        }
    written = {"base_sha256": base_sha256, "adapters": index}
    text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def file_stems(names: Sequence[str]) -> list[str]:
    """Names of files for styles: what a file system may not take is a hyphen, and no two are one to any of them."""
    stems: list[str] = []
    taken = {"diffusion_pytorch_model"}  # the style prompts' file
    for name in names:
        stem = safe = re.sub(r"[^\w .-]+", "-", name)
        count = 1
        while stem.casefold() in taken:
            count += 1
            stem = f"{safe}-{count}"
        taken.add(stem.casefold())
        stems.append(stem)
    return stems


def write_adapter(
    adapter: Adapter,
    folder: Path,
    stem: str,
    metadata: Mapping[str, str],
    component: str,
    family: Family,
) -> list[Path]:
    """Write one adapter: its low-rank part, and its whole differences, each where there are any.

    Returns: the files.
    Raises: UserError: a value is not finite.
    """
    written = []
    for path, (tensors, names) in (
        (folder / f"{stem}.safetensors", lora_tensors(adapter, component, family)),
        (folder / f"{stem}.diff.safetensors", difference_tensors(adapter, component, family)),
    ):
        if tensors:
            check_finite(tensors, str(path))
            header = {
                "format": "pt",
                "ss_network_module": "networks.lora",
                "ss_network_dim": "Dynamic",
                _NAMES: json.dumps(names),
            }
            write_tensors(path, tensors, {**header, **metadata})
            written.append(path)
    return written


def lora_tensors(adapter: Adapter, component: str, family: Family) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's low-rank part in kohya's layout, or of a transformer in diffusers', and the parameter that each
    layer's name stands for.
    """
    in_kohyas = transformer_of(family) is None  # which counts their blocks otherwise than diffusers, and is not read
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for of, name, one in _layers(adapter, component):
        module = name.removesuffix(".weight")
        up = one.up.reshape(*one.up.shape, *(1,) * (one.down.ndim - 2)).contiguous()
        if not in_kohyas:
            layer = f"{of}.{in_files(of, module)}"
            tensors |= {f"{layer}.lora_A.weight": one.down.contiguous(), f"{layer}.lora_B.weight": up}
        else:
            layer = kohya_name(of, module, family)
            tensors |= {f"{layer}.lora_down.weight": one.down.contiguous(), f"{layer}.lora_up.weight": up}
            tensors[f"{layer}.alpha"] = torch.tensor(float(one.rank))
        names[layer] = _told(of, component, name)
    return tensors, names


def difference_tensors(adapter: Adapter, component: str, family: Family) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's whole differences as ComfyUI reads them, and the parameter that each key stands for; with them what
    changes a text encoder outside of its layers.
    """
    tensors, names = {}, {}
    for name, offset in adapter.offsets.items():
        module, _, parameter = name.rpartition(".")
        key = f"{kohya_name(component, module, family)}.{_ENDINGS.get(parameter, parameter)}"
        tensors[key], names[key] = offset.contiguous(), name
    for of, text in adapter.text.items():
        (prefix,) = (one.comfy[0] for one in family.components if one.name == of)
        for name, offset in text.offsets.items():
            module, _, parameter = name.rpartition(".")
            key = f"{prefix}{in_files(of, module)}.{_ENDINGS.get(parameter, parameter)}"
            tensors[key], names[key] = offset.contiguous(), _told(of, component, name)
        for name, one in text.factors.items():
            if _WITH_LORAS not in name:
                layer = f"{prefix}{in_files(of, name.removesuffix('.weight'))}"
                tensors |= {f"{layer}.lora_down.weight": one.down.contiguous()}
                tensors |= {f"{layer}.lora_up.weight": one.up.contiguous()}
                tensors |= {f"{layer}.alpha": torch.tensor(float(one.rank))}
                names[layer] = _told(of, component, name)
    return tensors, names


def _layers(adapter: Adapter, component: str) -> Iterator[tuple[str, str, Factors]]:
    """The changes that a LoRA carries, each with its component and its weight's name."""
    for name, one in adapter.factors.items():
        yield component, name, one
    for of, text in adapter.text.items():
        for name, one in text.factors.items():
            if _WITH_LORAS in name:
                yield of, name, one


def _told(of: str, denoiser: str, name: str) -> str:
    """A parameter's name as headers have it."""
    return name if of == denoiser else f"{of}{_IN}{name}"


def read_adapter(files: Sequence[Path]) -> Adapter:
    """Read what :func:`write_adapter` wrote.

    Raises: UserError: a file is damaged, or no adapter of ours.
    """
    # by text encoder; the denoiser's under no name
    factors: dict[str, dict[str, Factors]] = {"": {}}
    offsets: dict[str, dict[str, Tensor]] = {"": {}}
    for path in files:
        written = read_header(path).metadata.get(_NAMES)
        if written is None:
            raise UserError(f"{path}: its header does not name what it changes; it is no style of a merged model.")
        names, tensors = parse_json(written, f"{path}: its {_NAMES}"), read_tensors(path)
        check_finite(tensors, str(path))
        try:
            for key, told in names.items():
                component, _, name = str(told).rpartition(_IN)
                if key in tensors:
                    offsets.setdefault(component, {})[name] = tensors[key]
                    continue
                ends = ("lora_B", "lora_A") if f"{key}.lora_B.weight" in tensors else ("lora_up", "lora_down")
                up, down = (tensors[f"{key}.{end}.weight"] for end in ends)
                factors.setdefault(component, {})[name] = Factors(up.flatten(1), down)
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise UserError(f"{path}: its {_NAMES} does not tell what its tensors change. Get another copy.") from error
    components = [one for one in dict.fromkeys([*factors, *offsets]) if one]
    text = {one: Adapter(factors.get(one, {}), offsets.get(one, {})) for one in components}
    return Adapter(factors[""], offsets[""], text)


def _read_index(path: Path) -> tuple[dict[str, dict[str, str]], str]:
    index = read_json(path)
    try:
        files = {str(style): dict(one["files"]) for style, one in index["adapters"].items()}
        inside = all(Path(file).name == file for of_style in files.values() for file in of_style)
        digest = str(index["base_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: it does not tell which files a style has.") from error
    if not inside:  # a name may not lead out of the folder
        raise UserError(f"{path} is damaged: a style's file lies elsewhere.")
    return files, digest
