"""Weights that are not what they look like: scaled eight-bit floats are unpacked, packed forms are refused.

A file of *scaled fp8* keeps a weight W as eight-bit floats and a number, or a number for each output, beside it:

    W = stored * scale

under ``….scale_weight`` (ComfyUI) or ``….weight_scale`` (others). What is only for computing in eight bits, the scales
of inputs, goes. Integers, four-bit and other packed forms have no such simple meaning, and to average them as if they
were weights ruins the model: they are refused by name.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dmm.errors import UserError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

_SCALES = (".scale_weight", ".weight_scale")
_UNUSED = (".scale_input", ".input_scale", ".scale_output", ".output_scale", ".comfy_quant")
_MARK = "scaled_fp8"
# what tells a packed form, at the end of a tensor's name or within it
_PACKED = (
    (".quant_state.bitsandbytes__nf4", "four-bit NormalFloat (NF4, bitsandbytes)"),
    (".quant_state.bitsandbytes__fp4", "four-bit floats (FP4, bitsandbytes)"),
    (".quant_map", "bitsandbytes' blocks"),
    (".absmax", "blocks of integers with their maxima (bitsandbytes)"),
    (".SCB", "eight-bit integers (LLM.int8, bitsandbytes)"),
    (".qzeros", "packed integers (GPTQ or AWQ)"),
    (".qweight", "packed integers (GPTQ, AWQ or SVDQuant)"),
    (".g_idx", "packed integers (GPTQ)"),
    (".wscales", "four-bit weights (SVDQuant, Nunchaku)"),
    (".weight_packed", "packed integers (compressed-tensors)"),
    (".weight_scale_2", "four-bit floats (NVFP4)"),
    (".weight_scale_inv", "eight-bit floats in blocks"),
    (".W_q", "packed integers (HQQ)"),
    (".codebooks", "codes of a book (AQLM)"),
    ("._data", "packed weights (quanto)"),
    (".weight_qdata", "packed weights (torchao)"),
    (".weight.tensor_data_names", "packed weights (torchao)"),
    (".weight_format", "packed weights"),
    (".zero_point", "packed integers"),
    (".weight_zero_point", "packed integers"),
)
# integers of checkpoints that are no weights: positions, counters of training
_COUNTS = ("position_ids", "num_updates", "num_batches_tracked", "global_step", "decay", "epoch")


def check_not_packed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file whose weights are quantised in a way that is not unpacked here.

    Args:
        tensors: what the file declares.
    Raises: UserError: naming the form, and a tensor that shows it.
    """
    for name, tensor in tensors.items():
        form = next((form for part, form in _PACKED if name.endswith(part) or f"{part}." in name), None)
        if form is None and _is_no_weight(name, tensor):
            form = f"{_kind(tensor.dtype)} ({str(tensor.dtype).removeprefix('torch.')})"
        if form is None and _is_unknown_scale(name, tensors):
            form = "numbers with a scale of a kind that is not known here"
        if form is not None:
            raise UserError(
                f"{path} is quantised: it keeps weights as {form}, as '{name}' shows. Such a file is made for painting "
                "and cannot be merged or exported; get the model in fp16, bf16, fp32 or (scaled) fp8."
            )


def scales_of(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which scaled fp8 weights a file holds: by the weight's name, its scale's.

    Args:
        tensors: what the file declares.
    Raises: UserError: a scale that belongs to no weight in fp8, or is neither one number nor one for each output.
    """
    found = {}
    for name, scale in tensors.items():
        suffix = next((suffix for suffix in _SCALES if name.endswith(suffix)), None)
        if suffix is None:
            continue
        weight_name = name.removesuffix(suffix) + ".weight"
        weight = tensors.get(weight_name)
        if weight is None or weight.dtype not in FLOAT8:
            dtype = "is missing" if weight is None else f"is {str(weight.dtype).removeprefix('torch.')}"
            raise UserError(
                f"{path}: '{name}' is the scale of a weight in fp8, but '{weight_name}' {dtype}. The file is of "
                "another kind of quantisation, or damaged; get the model in fp16, bf16 or fp32."
            )
        by_output = scale.ndim > 0 and len(scale) == scale.numel() == len(weight)
        if scale.numel() != 1 and not by_output:
            raise UserError(
                f"{path}: '{name}' has the shape {tuple(scale.shape)}, expected one number, or one for each of the "
                f"{len(weight)} outputs of '{weight_name}'. Blocks of other sizes are not unpacked; "
                "get the model in fp16 or bf16."
            )
        found[weight_name] = name
    return found


def is_of_quantisation(name: str) -> bool:
    """Whether a tensor of this name is no weight, but tells how weights are stored."""
    return name == _MARK or name.endswith(("." + _MARK, *_SCALES, *_UNUSED))


def declared_unpacked(tensors: Mapping[str, Tensor], scales: Iterable[str]) -> dict[str, Tensor]:
    """What a file declares once its scaled weights are unpacked; the same where it has none.

    Args:
        tensors: on the meta device.
        scales: the scaled weights' names.
    """
    scaled = set(scales)
    return {
        name: torch.empty(tensor.shape, dtype=torch.float32, device="meta") if name in scaled else tensor
        for name, tensor in tensors.items()
        if not is_of_quantisation(name)
    }


def unpack(stored: Tensor, scale: Tensor, rows: Tensor | None = None) -> Tensor:
    """Weights in float32, exactly what eight bits and scale say.

    Args:
        stored: (out, ...) in fp8; or flattened elements, with ``rows``.
        scale: of one element, or of one for each output.
        rows: which output each of the flattened elements is of.
    """
    factors = scale.float().flatten()
    if rows is not None:
        return stored.float() * (factors if len(factors) == 1 else factors[rows])
    return stored.float() * factors.reshape(-1, *(1,) * (stored.ndim - 1))


def _is_no_weight(name: str, tensor: Tensor) -> bool:
    """Whether a tensor that stands where a weight must be is not of floating point."""
    if tensor.dtype.is_floating_point or is_of_quantisation(name) or name.endswith(_COUNTS):
        return False
    return tensor.ndim >= 2 or name.endswith((".weight", ".bias"))


def _is_unknown_scale(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor scales the weight beside it, and is none of the scales that are unpacked."""
    layer, _, last = name.rpartition(".")
    beside = f"{layer}.weight" in tensors or layer in tensors
    return "scal" in last and beside and not is_of_quantisation(name)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex numbers"
    return "truth values" if dtype == torch.bool else "integers"
