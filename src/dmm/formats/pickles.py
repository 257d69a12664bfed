"""Pickled checkpoints: their tensors, and nothing else of theirs.

They are read with ``weights_only``, which builds tensors and plain containers and refuses every other class. Trainers
leave such classes in their files all the same (Lightning's callbacks, NumPy's scalars: some of the most used models'
original files have them), so each gets an inert stand-in of its name here, which takes what it is given and does
nothing with it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.errors import UserError

_MAX_STAND_INS = 200  # of a file: more is no checkpoint of a trainer's
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global")
_BLOCKED = re.compile(r"GLOBAL (\S+) whose module")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def unpickle(path: Path, device: str) -> dict[str, Tensor]:
    """The named tensors of a pickle; nothing that it names is imported or run.

    Args:
        device: where the tensors go; on ``meta`` they have no values.
    Raises: UserError: it is damaged, or holds no named tensors.
    """
    loaded = _load(path, device)
    while isinstance(loaded, dict) and "state_dict" in loaded:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__} where named tensors were expected.")
    return {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _load(path: Path, device: str) -> Any:
    stand_ins: dict[str, type[_StandIn]] = {}
    while len(stand_ins) <= _MAX_STAND_INS:
        try:
            with _standing_in(stand_ins):
                return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds for what it cannot or will not read
            reason = _COLOURS.sub("", str(error))
            refused = _REFUSED.search(reason)
            if refused is None or refused[1] in stand_ins:
                raise UserError(_told(path, reason)) from error
            stand_ins[refused[1]] = type("StandIn", (_StandIn,), {})
    raise UserError(f"{path} names more than {_MAX_STAND_INS} classes, so it is no checkpoint. Get another copy of it.")


class _StandIn:
    """What a file's object becomes whose class is not tensors' or plain containers'."""

    def __new__(cls, *_args: object) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_args: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


@contextmanager
def _standing_in(stand_ins: dict[str, type[_StandIn]]) -> Iterator[None]:
    # by the name that the file gives: builtins go by theirs alone in torch's errors
    named: list[Any] = [(stand_in, name if "." in name else f"builtins.{name}") for name, stand_in in stand_ins.items()]
    with torch.serialization.safe_globals(named):
        yield


def _told(path: Path, reason: str) -> str:
    blocked = _BLOCKED.search(reason)
    if blocked is not None:
        return (
            f"{path} names {blocked[1]}, which no checkpoint needs: it would run something when it is opened. Nothing "
            "of it was run; get the model as a .safetensors file."
        )
    first = " ".join(reason.split())[:200]
    return f"{path} cannot be read as a pickle of tensors alone, and no other is opened: {first}"
