"""The configs and the tokenizer of a single file, which holds weights alone: told in its metadata, and found again.

A file that we write carries its pipeline's configs, and says which folder or hub id they are of. A tokenizer is carried
where it is small; CLIP's, which is not, comes from there, or from the hub as diffusers has it. A file that says nothing
follows the embedded models where it has their widths, and its family's first model on the hub where it has not.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
from huggingface_hub import snapshot_download

import dmm
from dmm.errors import UserError
from dmm.families import Family
from dmm.files.cache import cache_folder
from dmm.files.outputs import new_folder
from dmm.formats.skeleton import build_skeletons
from dmm.formats.tensors import Header

CONFIGS_KEY = "dmm.configs"
"""Of a file's metadata: a pipeline folder's small files by their paths, as JSON."""
FOLLOWS_KEY = "dmm.follows"
"""Of a file's metadata: the pipeline folder that they are of, seen from the file's, or its hub id."""

_EMBEDDED = Path(dmm.__file__).parent / "demo" / "weights"
_MAX_TOKENIZER = 65_536  # characters: the embedded models' has half of them, CLIP's thirty times as many
_WHOLE_TOKENIZER, _OLDER_TOKENIZER = "tokenizer.json", ("vocab.json", "merges.txt")
_HUB_FILES = ("*.json", "*/*.json", "*/*.txt")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_SMALL_FILE = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*\.(?:json|txt)")
_PLACES = ("_name_or_path", "name_or_path")  # keys of configs that say where they were loaded from


def describe_pipeline(pipeline: Any, file: Path) -> dict[str, str]:
    """What the metadata of a file say of its configs.

    Args:
        pipeline: whose weights the file holds.
        file: where it will be.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipeline.save_config(folder)
        for name, part in pipeline.components.items():
            if hasattr(part, "save_config"):
                part.save_config(folder / name)
            elif part is not None:
                getattr(part, "config", part).save_pretrained(folder / name)
        told = {CONFIGS_KEY: _carried(folder)}
    return told | _describe_source(str(pipeline.name_or_path or ""), file)


def describe_folder(folder: Path, file: Path, scheduler: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What the metadata of a file say of its configs, which are those of a stock pipeline folder.

    Args:
        file: where it will be.
        scheduler: its scheduler config, where that is another.
    """
    return {CONFIGS_KEY: _carried(folder, scheduler), **_describe_source(str(folder), file)}


def carried_config(path: Path, header: Header, name: str) -> dict[str, Any] | None:
    """One of the configs that a single file carries; None where it does not.

    Args:
        name: of the config, as a pipeline folder has it.
    Raises: UserError: what the file carries cannot be read.
    """
    told = header.metadata.get(CONFIGS_KEY)
    config = None if told is None else _carried_files(path, told).get(name)
    return config if isinstance(config, dict) else None


def find_configs(path: Path, header: Header, family: Family) -> Path:
    """The pipeline folder whose configs and tokenizer a single file follows; its weights, if any, are of no account.

    Raises: UserError: what the file says cannot be read; or the hub is needed, and does not give what is.
    """
    told = header.metadata.get(CONFIGS_KEY)
    if told is not None:
        return _unpack(path, told, header.metadata.get(FOLLOWS_KEY, ""), family)
    packaged = _EMBEDDED / family.name / "configs"
    if packaged.is_dir() and _has_widths_of(header, packaged, family):
        return packaged
    return _fetch(path, family.hub_id, family)


def describe_as(other: Path, metadata: Mapping[str, str], file: Path) -> dict[str, str]:
    """What the metadata of a file say of its configs, which are those of another file; nothing if that says nothing.

    Args:
        other: the other file.
        metadata: the other file's.
        file: where it will be.
    """
    if CONFIGS_KEY not in metadata:
        return {}
    follows = metadata.get(FOLLOWS_KEY, "")
    folder = str(other.resolve().parent / follows) if follows.startswith(".") else follows
    return {CONFIGS_KEY: metadata[CONFIGS_KEY], **_describe_source(folder, file)}


def _describe_source(followed: str, file: Path) -> dict[str, str]:
    """What the metadata of a file say of the folder or hub id that it follows; nothing of what is neither."""
    folder = Path(followed)
    if not (folder / "model_index.json").is_file():
        return {FOLLOWS_KEY: followed} if _HUB_ID.fullmatch(followed) and not folder.exists() else {}
    absolute = folder.resolve()
    if cached := next((match for part in absolute.parts if (match := _CACHED.fullmatch(part))), None):
        return {FOLLOWS_KEY: f"{cached[1]}/{cached[2]}"}
    relative = os.path.relpath(absolute, file.resolve().parent).replace(os.sep, "/")
    # so that no folder beside the file is taken for a hub id
    return {FOLLOWS_KEY: relative if relative.startswith(".") else f"./{relative}"}


def _carried(folder: Path, scheduler: Mapping[str, Any] | None = None) -> str:
    index = _plain(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    if scheduler is not None:
        index |= {"scheduler": ["diffusers", scheduler["_class_name"]]}
    files: dict[str, Any] = {"model_index.json": index}
    for name in _parts(index):
        small = {
            f"{name}/{file.name}": _plain(json.loads(text)) if file.suffix == ".json" else text
            for file in sorted((folder / name).glob("*"))
            if file.suffix in (".json", ".txt") and ".index." not in file.name
            for text in [file.read_text(encoding="utf-8")]
        }
        if f"{name}/{_WHOLE_TOKENIZER}" in small:  # the older files beside it say the same
            small = {file: content for file, content in small.items() if Path(file).name not in _OLDER_TOKENIZER}
        if not _is_tokenizer(name) or len(_as_json(small)) <= _MAX_TOKENIZER:
            files |= small
    if scheduler is not None:
        files["scheduler/scheduler_config.json"] = _plain(dict(scheduler))
    return _as_json(files)


def _plain(value: Any) -> Any:
    """A config without where it was loaded from, which is nobody's business."""
    return {k: v for k, v in value.items() if k not in _PLACES} if isinstance(value, dict) else value


def _parts(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline that are there, by its ``model_index.json``."""
    return [name for name, part in index.items() if isinstance(part, list) and part[0] is not None]


def _is_tokenizer(part: str) -> bool:
    return part.startswith("tokenizer")


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _unpack(path: Path, told: str, follows: str, family: Family) -> Path:
    """What a file carries, as a folder in the user's cache, with what it does not carry beside it."""
    files = _carried_files(path, told)
    try:
        missing = [name for name in _parts(files["model_index.json"]) if _is_tokenizer(name) and not _has(files, name)]
        for name in (*files, *missing):
            if not _SMALL_FILE.fullmatch(name if name in files else f"{name}/config.json"):
                raise ValueError(f"it names '{name}'")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(path, error) from error
    source = _source_of(path, follows, family) if missing else None
    digest = hashlib.sha256(f"{told}{source}".encode()).hexdigest()[:16]
    folder = platformdirs.user_cache_path("dmm") / "configs" / digest
    if folder.is_dir():
        return folder
    with new_folder(cache_folder("configs") / digest, overwrite=True) as building:  # another process may be as far
        for name, content in files.items():
            file = building / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(content if isinstance(content, str) else _as_json(content), encoding="utf-8")
        for name in missing:
            assert source is not None
            shutil.copytree(source / name, building / name)
    return folder


def _carried_files(path: Path, told: str) -> dict[str, Any]:
    try:
        return dict(json.loads(told))
    except (ValueError, TypeError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: its metadata '{CONFIGS_KEY}' cannot be read ({error!r}). Name a pipeline folder of the same "
        "architecture as its config (config=, --config)."
    )


def _has(files: Mapping[str, Any], part: str) -> bool:
    return any(name.startswith(f"{part}/") for name in files)


def _source_of(path: Path, follows: str, family: Family) -> Path:
    """Where the tokenizer is that a file does not carry: in the folder that it follows, or else on the hub."""
    if follows.startswith("."):
        folder = path.resolve().parent / follows
        return folder if (folder / "model_index.json").is_file() else _fetch(path, family.hub_id, family)
    return _fetch(path, follows or family.hub_id, family)


def _fetch(path: Path, hub_id: str, family: Family) -> Path:
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
        # offline, what an earlier command fetched for other ends is given, too
        for name in ("model_index.json", *family.tokenizers, *(component.name for component in family.components)):
            if not (folder / name).exists():
                raise ValueError(f"there is no {name} in the part of it that was fetched")
        return folder
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix("Got: ").rstrip(".")
        raise UserError(
            f"{path} is a single file, which needs the configs and the tokenizer of '{hub_id}', and the hub did not "
            f"give them ({reason}). Go online once, or name a pipeline folder of the same architecture as its config "
            "(config=, --config)."
        ) from error


def _has_widths_of(header: Header, folder: Path, family: Family) -> bool:
    """Whether a file's tensors have the shapes of a folder's denoiser, all but for their names."""
    skeleton = build_skeletons(folder, family)[family.denoiser.name]
    prefix = family.denoiser.original_prefix
    found = sorted(tuple(tensor.shape) for name, tensor in header.tensors.items() if name.startswith(prefix))
    return found == sorted(tuple(tensor.shape) for tensor in skeleton.state_dict().values())
