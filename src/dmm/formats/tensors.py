"""Weight files: what one declares, checked before anything is loaded; reading; writing."""

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmm.errors import UserError
from dmm.files.weights import check_beginning, read_declared
from dmm.formats.pickles import unpickle
from dmm.formats.quantised import check_not_packed, declared_unpacked, is_of_quantisation, scales_of, unpack

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in safetensors files."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a weight file declares."""

    tensors: dict[str, Tensor]
    """On the meta device: names, shapes and dtypes without values."""
    metadata: dict[str, str]
    offsets: dict[str, tuple[int, int]] = field(default_factory=dict)
    """First byte of each tensor in the file, and the one after its last; empty of a pickle."""
    stored: dict[str, Tensor] = field(default_factory=dict)
    """As ``tensors``, but of all that is in the file, as it is kept there."""
    scales: dict[str, str] = field(default_factory=dict)
    """Of weights in scaled fp8, which ``tensors`` has unpacked: the names of their scales."""


def read_header(path: Path, *, allow_pickle: bool = False) -> Header:
    """Read what a weight file declares, without its weights.

    Args:
        path: a .safetensors file; a pickle only with ``allow_pickle``, and then read with ``weights_only``.
    Raises: UserError: missing, empty, cut short, a pickle that is not allowed, or no weight file at all.
    """
    if check_beginning(path, allow_pickle=allow_pickle):
        return _unpacked(path, Header(unpickle(path, "meta"), {}))
    return _unpacked(path, _read_safetensors_header(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the weights of a file that ``read_header`` has passed, onto the CPU; scaled fp8 in float32."""
    stored = load_file(path) if path.suffix.lower() == ".safetensors" else unpickle(path, "cpu")
    scales = scales_of(path, stored)
    return {
        name: unpack(tensor, stored[scales[name]]) if name in scales else tensor
        for name, tensor in stored.items()
        if not is_of_quantisation(name)
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all: it gets its name once it is complete.

    The same tensors and metadata make the same bytes. Its mode is what the umask says.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(plain, temporary, dict(metadata))
        temporary.chmod(stat.S_IMODE(mode))  # the library's file is its owner's only
        _sort_metadata(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors header's metadata in order, in place: the library writes it in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity.

    Args:
        where: what the tensors belong to, as the error's first words.
    Raises: UserError: naming the first tensor that holds one, and how many values of it do.
    """
    for name, tensor in tensors.items():
        # a sum is finite only if every value is, bar an overflow: cheap enough to ask of gigabytes
        if not tensor.is_floating_point() or math.isfinite(tensor.float().sum().item()):
            continue
        broken = tensor.numel() - int(tensor.float().isfinite().sum())
        if broken:
            raise UserError(
                f"{where}: {broken} of the {tensor.numel()} values of '{name}' are NaN or infinite in {tensor.dtype}. "
                "The file is damaged, or its values are too large for that dtype; get another copy or another dtype."
            )


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is whole, whatever it holds: one of ours, which need not be a model's.

    Raises: UserError: missing, cut short, or not valid.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path.")
    _read_safetensors_header(path)


def _read_safetensors_header(path: Path) -> Header:
    declared, start = read_declared(path)
    size = path.stat().st_size
    try:
        metadata = declared.pop("__metadata__", None) or {}  # null, which the library opens, is none
        offsets = {}
        for name, entry in declared.items():
            begin, stop = entry["data_offsets"]
            offsets[name] = (start + begin, start + stop)
        end = max((stop for _, stop in offsets.values()), default=start)
        unknown = {str(entry["dtype"]): name for name, entry in declared.items() if entry["dtype"] not in DTYPES}
        if not unknown:
            tensors = {
                name: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
                for name, entry in declared.items()
            }
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is not a safetensors file: its header cannot be read ({error!r}).") from error
    if unknown:
        dtype, name = next(iter(unknown.items()))
        raise UserError(
            f"{path}: '{name}' is kept as {dtype[:40]}, a dtype that is not read here; one of {', '.join(DTYPES)} was "
            "expected. Get the model in fp16, bf16 or fp32."
        )
    if end < size:
        raise UserError(
            f"{path} has bytes too many: its header declares {end} bytes, the file has {size}. Download it again."
        )
    if end > size:
        lost = min((begin, name) for name, (begin, stop) in offsets.items() if stop > size)[1]
        raise UserError(
            f"{path} is cut short: its header declares {end} bytes, the file has {size}, which ends before or within "
            f"'{lost}'. Download it again."
        )
    _check_offsets(path, tensors, offsets, start)
    try:
        with safe_open(path, framework="pt"):  # the library's own checks, whatever is left
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}. Download it again.") from error
    return Header(tensors, metadata, offsets)


def _unpacked(path: Path, stored: Header) -> Header:
    """A header as its file is read: what is packed is refused, what is scaled is unpacked."""
    check_not_packed(path, stored.tensors)
    scales = scales_of(path, stored.tensors)
    tensors = declared_unpacked(stored.tensors, scales)
    return Header(tensors, stored.metadata, stored.offsets, stored.tensors, scales)


def _check_offsets(
    path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, tuple[int, int]], start: int
) -> None:
    """Refuse tensors that overlap, leave holes between them, or take another number of bytes than they need."""
    before = "the header"
    for name in sorted(offsets, key=offsets.__getitem__):
        begin, end = offsets[name]
        if begin != start:
            fault = f"overlaps {before}" if begin < start else f"leaves a hole of {begin - start} bytes after {before}"
        elif end - begin != tensors[name].nbytes:
            fault = f"takes {end - begin} bytes where its shape and dtype need {tensors[name].nbytes}"
        else:
            start, before = end, f"'{name}'"
            continue
        raise UserError(f"{path} is not a valid safetensors file: '{name}' {fault}. Download it again.")
