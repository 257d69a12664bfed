"""A weight file, as far as it can be told without torch: what it begins with, and what its header declares."""

import json
from pathlib import Path
from typing import Any

from dmm.errors import UserError
from dmm.files.lora_names import is_lora

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_MAX_HEADER = 100_000_000  # bytes, as the format has it; what claims more is no header at all


def check_beginning(path: Path, *, allow_pickle: bool = False) -> bool:
    """Tell a weight file by what it begins with; a name can lie.

    Returns: whether it is a pickle.
    Raises: UserError: missing, empty, a pickle that is not allowed, or of no kind that is read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    with path.open("rb") as file:
        beginning = file.read(64)
    if not beginning:
        raise UserError(f"{path} is empty. Download it again.")
    if beginning.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` where it came from.")
    if beginning.startswith(b"GGUF"):
        raise UserError(
            f"{path} is quantised: it is a GGUF file. Get the model as .safetensors, in fp16, bf16 or fp32."
        )
    if beginning.startswith((b"PK\x03\x04", b"\x80\x02")):
        _check_pickle_allowed(path, allow_pickle)
        return True
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path} is neither a pickle nor named .safetensors. Pass weights in the safetensors format.")
    return False


def _check_pickle_allowed(path: Path, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened. Pass a .safetensors file, or allow pickles "
            "(allow_pickle, --allow-pickle) if you trust it."
        )
    if path.suffix.lower() not in PICKLE_SUFFIXES:
        raise UserError(f"{path} is a pickle by content but not by name. Rename it to end in .ckpt.")


def read_declared(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header: its entries by name with ``__metadata__`` among them, and where its data begin.

    Raises: UserError: it is cut short within its header, or has none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        possible = length <= _MAX_HEADER
        text = file.read(length) if possible and 8 + length <= size else None
    if text is None and possible:
        raise UserError(
            f"{path} is cut short: its header alone takes {8 + length} bytes, the file has {size}. Download it again."
        )
    try:
        declared = json.loads(text or b"")
        if not isinstance(declared, dict):
            raise TypeError(f"a {type(declared).__name__} where names were expected")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a safetensors file: its header cannot be read ({error!r}).") from error
    return declared, 8 + length


def check_model_file(path: Path, *, allow_pickle: bool = False) -> None:
    """Refuse what can be told to be no full model's file before anything heavy is imported.

    Raises: UserError: as :func:`check_beginning` and :func:`read_declared`; or a LoRA.
    """
    if not check_beginning(path, allow_pickle=allow_pickle):
        check_no_lora(path, read_declared(path)[0])


def check_no_lora(path: Path, names: Any) -> None:
    """Refuse the tensors' names of a LoRA where a model's were expected.

    Raises: UserError.
    """
    if is_lora(names):
        raise UserError(
            f"{path} is a LoRA, not a full model. Pass it as the LoRA (lora=, --lora) and the model it was trained "
            "on as the model."
        )


def is_lora_file(path: Path) -> bool:
    """Whether a path is a safetensors file whose header is a LoRA's; all else is left to what reads it."""
    try:
        return path.suffix.lower() == ".safetensors" and path.is_file() and is_lora(read_declared(path)[0])
    except (UserError, OSError):
        return False
