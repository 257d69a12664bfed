"""Checkpoints: everything a run needs to go on, each saved whole or not at all.

A root holds one folder a checkpoint::

    root/step-00002500/student.safetensors     one file for each group of tensors
                       info.json               everything that is no tensor
                       manifest.json           written last: size and sha256 of every other file
    root/.tmp-2500-9f1c02ab/                   a save that is under way, or was killed

A folder is filled and synced under a temporary name and renamed once it is complete, so whatever has
its final name was whole once, and its manifest tells whether it still is. Nothing is pickled.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from dmm.errors import UserError
from dmm.files.digest import sha256
from dmm.files.json import read_json
from dmm.files.runs import checkpoints, step_of
from dmm.formats.tensors import DTYPE_NAMES, check_finite, check_safetensors

MANIFEST = "manifest.json"
INFO = "info.json"

_logger = logging.getLogger(__name__)

_CHUNK = 2**24  # bytes that are hashed and written at a time


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Groups of named tensors, on the CPU. They are mapped from the files: only what is read takes memory."""
    info: dict[str, Any]


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, Any], *, keep: int
) -> Path:
    """Save a checkpoint, then remove older ones.

    To be called by one process of a run. A step that is saved again gets a folder of its own, which from then on is
    the newest: nothing that is whole is ever replaced.

    Args:
        root: made where it is missing.
        step: how many steps were trained.
        tensors: groups of named tensors, on any device; they may share memory. Each group becomes a file.
        info: plain JSON: everything else.
        keep: how many checkpoints stay, at least 1: this one and the newest before it.
    Returns: the checkpoint's folder.
    Raises: UserError: a floating-point value is NaN or infinite, or the disk is full or cannot be written. No
        temporary is left, and the checkpoints that were there are as they were.
    """
    assert keep >= 1
    for group, named in tensors.items():
        _check_finite(f"step {step}: {group}", named)
    text = json.dumps(dict(info), allow_nan=False)
    assert json.loads(text) == info, "info is no plain JSON"

    # a name of its own: two processes that save at once do not meet
    temporary = root / f".tmp-{step}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        files = {f"{group}.safetensors": _write_tensors(temporary, group, named) for group, named in tensors.items()}
        files[INFO] = _write_text(temporary / INFO, text)
        _write_text(temporary / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
        _sync_folder(temporary)
        folder = _put_in_place(temporary, root, step)
        _sync_folder(root)
    except OSError as error:
        raise UserError(
            f"The checkpoint of step {step} could not be written to '{root}': {error.strerror or error}. Those "
            "before it are whole: mend that and resume."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(root, folder, keep)
    return folder


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that is whole; reads every byte of it. Those that are not are left, with a warning.

    Returns: its folder; None where there is none.
    """
    for folder in reversed(checkpoints(root)):
        defect = _defect(folder)
        if defect is None:
            return folder
        _logger.warning("The checkpoint '%s' is passed over: %s.", folder, defect)
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load what :func:`newest_checkpoint` has found whole.

    Raises: UserError: a file of it is of another kind than its name says, or a value is NaN or infinite.
    """
    manifest = read_json(folder / MANIFEST)
    info = read_json(folder / INFO)
    tensors = {}
    for name in manifest["files"]:
        if name != INFO:
            check_safetensors(folder / name)
            tensors[Path(name).stem] = load_file(folder / name)
            check_finite(tensors[Path(name).stem], str(folder / name))
    return Checkpoint(int(manifest["step"]), tensors, info)


def sweep(root: Path) -> None:
    """Remove what killed saves have left; to be called by one process, while none saves to ``root``."""
    for temporary in root.glob(".tmp-*"):
        _logger.info("Removing '%s', which a save that was killed has left.", temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def pack_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and JSON, for :func:`save_checkpoint`.

    Args:
        optimizer: any whose state is tensors and numbers.
        parameters: by name, as of ``named_parameters()``; all that the optimizer has, and perhaps more.
    Returns: the tensors, named ``exp_avg/conv_in.weight``, and the rest. The tensors are the optimizer's own.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{key}/{names[parameter]}"] = value
    groups = [
        {
            # tuples are lists in JSON; betas are all there is of them
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in _options(group).items()},
            "shapes": {names[parameter]: list(parameter.shape) for parameter in group["params"]},
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "numbers": numbers}


def unpack_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Give an optimizer the state that :func:`pack_optimizer` has taken, to the bit.

    ``load_state_dict`` goes by position and casts to the parameters' dtype; this goes by name and casts nothing.

    Args:
        optimizer: one of the same class and groups; its parameters may be in another order.
        parameters: as for :func:`pack_optimizer`.
        tensors, info: copied, not kept.
    Raises: UserError: a parameter is missing, new, of another shape or in another group; ``optimizer`` is unchanged.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    now = [{names[p]: list(p.shape) for p in group["params"]} for group in optimizer.param_groups]
    _check_same([group["shapes"] for group in info["groups"]], now)

    states: dict[str, dict[str, Any]] = {}
    for entry, value in [*tensors.items(), *info["numbers"].items()]:
        key, _, name = entry.partition("/")
        states.setdefault(name, {})[key] = value
    for group, saved in zip(optimizer.param_groups, info["groups"], strict=True):
        # which kernel steps is this device's matter: the run may have begun on another
        options = {key: value for key, value in saved["options"].items() if key != "fused"}
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
        # where torch keeps the count of steps: on the CPU, unless a kernel reads it
        step_on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
            for key, value in states.get(names[parameter], {}).items():
                if isinstance(value, Tensor):
                    device = parameter.device if key != "step" or step_on_device else torch.device("cpu")
                    value = _copy_like(value, parameter, device)
                optimizer.state[parameter][key] = value


def _copy_like(tensor: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    # in the parameter's memory format, such as channels_last, as the optimizer would have made it
    like = parameter if parameter.shape == tensor.shape else tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=device, requires_grad=False).copy_(tensor)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _check_same(saved: list[dict[str, list[int]]], now: list[dict[str, list[int]]]) -> None:
    """Refuse an optimizer of other parameters than were saved."""
    advice = "Resume with the recipe that the run began with, or begin anew."
    if len(saved) != len(now):
        raise UserError(
            f"The checkpoint's optimizer has {len(saved)} groups of parameters, this run's {len(now)}. {advice}"
        )
    for i, (before, after) in enumerate(zip(saved, now, strict=True)):
        for name in [*before, *after]:
            if name not in after:
                raise UserError(f"The checkpoint's optimizer has '{name}' in group {i}, this run's has not. {advice}")
            if name not in before:
                raise UserError(f"This run's optimizer has '{name}' in group {i}, the checkpoint's has not. {advice}")
            if before[name] != after[name]:
                raise UserError(
                    f"'{name}' has shape {tuple(before[name])} in the checkpoint's optimizer and {tuple(after[name])} "
                    f"in this run's. {advice}"
                )


def _check_finite(where: str, named: Mapping[str, Tensor]) -> None:
    for name, tensor in named.items():
        if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            broken = tensor.numel() - int(finite.sum())
            raise UserError(
                f"{where}: {broken} of the {tensor.numel()} values of '{name}' are NaN or infinite, and were not "
                "saved. Resume from the checkpoint before with a lower learning_rate, or with precision bf16 or fp32."
            )


def _write_tensors(folder: Path, group: str, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, one tensor in memory at a time; returns its entry of the manifest.

    The library's own writer refuses tensors that share memory, copies those of a device all at once, and has no
    place to hash or sync.
    """
    # wide elements first, as the library does: every tensor is then aligned
    order = sorted(named, key=lambda name: (-named[name].itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + named[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[named[name].dtype],
            "shape": list(named[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _HashedFile(folder / f"{group}.safetensors") as file:
        file.write(memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            flat = named[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
    return file.entry()


def _write_text(path: Path, text: str) -> dict[str, Any]:
    with _HashedFile(path) as file:
        file.write(memoryview(text.encode()))
    return file.entry()


class _HashedFile:
    """A new file that is hashed while it is written, and on the disk once it is closed."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: memoryview) -> None:
        """Write bytes."""
        for start in range(0, len(data), _CHUNK):
            part = data[start : start + _CHUNK]
            self._digest.update(part)
            self._file.write(part)
        self._size += len(data)

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        return {"size": self._size, "sha256": self._digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # where a folder cannot be opened, let alone synced
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, root: Path, step: int) -> Path:
    """Rename a filled folder to the first free name of its step."""
    attempt = 1
    while True:
        folder = root / (f"step-{step:08d}" if attempt == 1 else f"step-{step:08d}.{attempt}")
        try:
            return temporary.rename(folder)  # which fails where there is a folder that holds something
        except OSError:
            if not folder.exists():
                raise
        attempt += 1


def _prune(root: Path, saved: Path, keep: int) -> None:
    """Remove checkpoints before ``saved`` until ``keep`` are left with it; later ones, which are broken, stay."""
    folders = checkpoints(root)
    older = folders[: folders.index(saved)] if saved in folders else []
    for folder in older[: max(len(older) + 1 - keep, 0)]:
        # renamed first: one that is half removed must not look like one that is broken
        doomed = root / f".tmp-{folder.name}-{secrets.token_hex(4)}"
        try:
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            _logger.warning("The old checkpoint '%s' could not be removed: %s.", folder, error.strerror or error)


def _defect(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where its manifest verifies."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return f"its {MANIFEST} is missing or cannot be read"
    # a name is of a file here, and no path to anywhere else
    if step_of(folder) != step or INFO not in files or any(re.search(r"[\\/\0]", name) for name in files):
        return f"its {MANIFEST} is damaged"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes, not {size}"
        if sha256(path) != digest:
            return f"its {name} has other bytes than were written"
    return None
