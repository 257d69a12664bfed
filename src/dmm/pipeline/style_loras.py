"""A style as an ordinary LoRA file, which other tools load onto the checkpoint that all styles share.

The style term t is added to the output of the last layer of what embeds time, W h + b, where h depends on nothing but
the timestep. If some u has u . h = 1 at every timestep, then W + t u^T adds the term as the bias b + t does, and t u^T
is a LoRA of rank one. Such a u exists, to rounding, where the layer is wide beside what h spans; where it is not, the
bias's own difference is written instead, which fewer tools read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.families import denoiser_of, family_of
from dmm.formats.original_layout import original_names
from dmm.formats.tensors import check_finite, write_tensors
from dmm.models.adapter_files import difference_tensors, file_stems, lora_tensors
from dmm.models.adapters import NOTHING, Adapter, Factors, mix_adapters
from dmm.models.styles import MAX_ERROR, constant_of
from dmm.pipeline.styled import style_prompts_of, style_term

DIFFUSERS_FOLDER = "diffusers"
"""Of the folder of LoRAs: the same styles as PEFT's adapters with a bias, exact to the bit, which diffusers loads."""


@dataclass(frozen=True)
class StyleLoras:
    """What was written.

    Attributes:
        error: how far ``u . h`` is from 1 at the worst timestep: the relative error of every style's term; 0 where
            none has one.
        are_loras: the error is small enough for them to be.
    """

    error: float
    are_loras: bool


def write_style_loras(pipe: Any, folder: Path, metadata: Mapping[str, Mapping[str, str]]) -> StyleLoras:
    """Write every style as ``NAME.safetensors``, and as PEFT has it in a folder beside.

    A style that changes more than its term has the rest of it in the same LoRA, or, where no LoRA can say it, in
    ``NAME.diff.safetensors``, in the layout of differences that ComfyUI reads. So has the term where the layer is too
    narrow.

    Args:
        pipe: a merged pipeline in float32.
        folder: is made.
        metadata: by style, strings for the headers.
    Raises: UserError: a term is not finite.
    """
    folder.mkdir(parents=True)
    prompts, family = style_prompts_of(pipe), family_of(pipe)
    # adapters alone have no term, whatever the layer's width
    direction, error = constant_of(denoiser_of(pipe), family.port) if prompts.config.dim else (torch.zeros(0), 0.0)
    direction = direction.float()
    are_loras = error <= MAX_ERROR
    weight = f"{family.port}.weight"
    original = original_names(pipe.components, family).get(family.denoiser.name, {}).get(weight, weight)
    layer = original.removeprefix(family.denoiser.original_prefix).removesuffix(".weight")
    for style, stem in zip(prompts.names, file_stems(prompts.names), strict=True):
        header = {"format": "pt", **metadata[style], **family.lora_metadata}
        adapter = prompts.adapters.get(style, NOTHING)
        loras, differences = adapter, difference_tensors(adapter, family.denoiser.name, family)[0]
        if prompts.config.dim:
            term = style_term(pipe, style).cpu()
            if are_loras:
                pair = Factors(term[:, None], direction[None])
                loras = mix_adapters([(1.0, adapter), (1.0, Adapter({f"{family.port}.weight": pair}, {}))])
            else:
                differences[f"diffusion_model.{layer}.diff_b"] = term
            if adapter is NOTHING:
                (folder / DIFFUSERS_FOLDER).mkdir(exist_ok=True)
                write_tensors(folder / DIFFUSERS_FOLDER / f"{stem}.safetensors", _as_peft(pipe, term), header)
        layers = lora_tensors(loras, family.denoiser.name, family)[0]
        ranks = {one.rank for one in loras.factors.values()}
        dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        network = {"ss_network_module": "networks.lora", "ss_network_dim": dim}
        for name, tensors in ((f"{stem}.safetensors", layers), (f"{stem}.diff.safetensors", differences)):
            if tensors:
                check_finite(tensors, f"the style '{style}'")
                write_tensors(folder / name, tensors, {**header, **network})
    return StyleLoras(error, are_loras)


def _as_peft(pipe: Any, term: Tensor) -> dict[str, Tensor]:
    """A term as a PEFT adapter that has nothing but a bias."""
    family = family_of(pipe)
    layer, width = f"{family.denoiser.name}.{family.port}", denoiser_of(pipe).get_submodule(family.port).in_features
    return {
        f"{layer}.lora_A.weight": torch.zeros(1, width),
        f"{layer}.lora_B.weight": torch.zeros(len(term), 1),
        f"{layer}.lora_B.bias": term,
    }
