"""Which tensors of a LoRA's file belong together, whatever layout it is in, and what is refused by its name."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dmm.errors import UserError

BUNDLED = "bundle_emb."
"""What OneTrainer's bundled embeddings are named: textual inversions, no part of the LoRA."""

# the ends of tensors' names, longer ones first where one ends another
_PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "core",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_B.default.bias": "up_bias",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude_of_outputs",
    ".lora_magnitude_vector.weight": "magnitude_of_outputs",
    ".lora_magnitude_vector": "magnitude_of_outputs",
    ".diff": "whole",
    ".diff_b": "whole_bias",
    ".w_norm": "whole",
    ".b_norm": "whole_bias",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{
        f".{name}": name
        for name in (
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
            *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
}
# parts of names that tell a relative which is not read
_STRANGERS = {
    ".oft_blocks": "an OFT",
    ".oft_diag": "an OFT",
    ".oft_R": "an OFT (PEFT)",
    ".boft_": "a BOFT",
    ".a1.weight": "a GLoRA",
    ".a2.weight": "a GLoRA",
    ".b1.weight": "a GLoRA",
    ".b2.weight": "a GLoRA",
    ".ia3_": "an (IA)^3 (PEFT)",
    ".on_input": "an (IA)^3",
    ".vera_": "a VeRA",
    ".fourierft_": "a FourierFT",
    ".waveft_": "a WaveFT",
    ".hra_": "an HRA",
    ".lora_embedding_": "a LoRA of embeddings (PEFT)",
    ".set_weight": "a replacement of whole weights",
    ".reshape_weight": "a replacement of whole weights",
    ".lora_E": "an AdaLoRA (PEFT)",
    ".lora_ranknum": "an AdaLoRA (PEFT)",
    ".miss_": "a MiSS (PEFT)",
    ".bone_": "a Bone (PEFT)",
    ".shira_": "a SHiRA (PEFT)",
    ".randlora_": "a RandLora (PEFT)",
    "token_adapter": "trained tokens",
    ".tlora_": "a T-LoRA",
}


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA or one of its relatives, in any layout."""
    telling = {part for part in _PARTS if part != ".alpha"} | {".lora_", ".hada_", ".lokr_"}
    return any(name.endswith(tuple(telling)) or any(part in name for part in _STRANGERS) for name in names)


def split_names(path: Path, keys: Collection[str]) -> dict[str, dict[str, str]]:
    """Layer name -> part -> key; bundled embeddings are left out.

    Raises: UserError: a tensor of a relative that is not read, or of no layout that is known.
    """
    names: dict[str, dict[str, str]] = {}
    for key in keys:
        if key.startswith(BUNDLED):
            continue
        suffix = max((suffix for suffix in _PARTS if key.endswith(suffix)), key=len, default=None)
        if suffix is None:
            # some have tensors of plain names, and say what they are by another one
            told = ((one, kind) for one in (key, *keys) for part, kind in _STRANGERS.items() if part in one)
            key, kind = next(told, (key, None))
            if kind is None:
                raise UserError(
                    f"{path}: '{key}' is no part of a LoRA, LoHa or LoKr that is known here. Fuse the file into a full "
                    "checkpoint with the tool that it comes from, and pass that."
                )
            raise UserError(
                f"{path} is {kind} ('{key}'), which is not read; LoRA, DoRA, LoHa, LoKr and whole differences are. "
                "Fuse it into a full checkpoint with the tool that it comes from, and pass that."
            )
        layer = key.removesuffix(suffix).replace(".processor.", ".")
        parts = names.setdefault(layer, {})
        if _PARTS[suffix] in parts:
            raise UserError(
                f"{path}: the layer '{layer}' has both '{parts[_PARTS[suffix]]}' and '{key}'. Two files were put into "
                "one; get them apart."
            )
        parts[_PARTS[suffix]] = key
    return names


def check_complete(path: Path, layer: str, parts: Mapping[str, str]) -> None:
    """Refuse a layer of which a part is missing.

    Raises: UserError: naming what it has.
    """
    found = set(parts)
    complete = (
        {"down", "up"} <= found
        or {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= found
        or (_has_factor(found, "lokr_w1") and _has_factor(found, "lokr_w2"))
        or bool(found & {"whole", "whole_bias"})
        or found == {"up_bias"}
    )
    if complete:
        return
    if found <= {"down", "up", "core", "alpha", "magnitude", "magnitude_of_outputs", "up_bias"}:
        raise UserError(
            f"{path}: the layer '{layer}' has {' and '.join(sorted(found))} but not both down and up. The file is "
            "incomplete; download it again."
        )
    raise UserError(
        f"{path}: the layer '{layer}' has only {' and '.join(sorted(found))}. The file is incomplete; download it "
        "again."
    )


def _has_factor(found: set[str], name: str) -> bool:
    return name in found or {f"{name}_a", f"{name}_b"} <= found
