"""What denoisers read of prompts and of pictures' sizes, as flat named tensors, which caches and batches can stack.

A name is that of the denoiser's keyword argument. One with a dot in it is an entry of an argument that is a mapping:
such a mapping is made only where the denoiser is called, by :func:`arguments`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_IDS = "_ids"


@dataclass(frozen=True)
class Frame:
    """What a picture was before it was cut to size; pixels."""

    original: tuple[int, int]
    """Width and height before it was scaled."""
    corner: tuple[int, int]
    """What was cut off at the left and at the top."""
    target: tuple[int, int]
    """Width and height that are painted."""

    @classmethod
    def whole(cls, width: int, height: int) -> "Frame":
        """Of a picture that never was larger: what pipelines take where they are told nothing."""
        return cls((width, height), (0, 0), (width, height))


def arguments(conditioning: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The keyword arguments of a denoiser's call.

    Args:
        conditioning: tensors by flat names; what is nested already stays so.
        dtype: that the embeddings are cast to, by default none. Numbers that a model itself embeds (names that end in
            ``_ids``) are not: half precision would make other sizes of them.
    """
    nested: dict[str, Any] = {}
    for name, value in conditioning.items():
        argument, _, entry = name.partition(".")
        if isinstance(value, Mapping):
            value = arguments(value, dtype)
        elif dtype is not None and not name.endswith(_IDS):
            value = value.to(dtype)
        if entry:
            nested.setdefault(argument, {})[entry] = value
        else:
            nested[argument] = value
    return nested


def read_one_clip(pipeline: Any, tokens: Mapping[str, Tensor], clip_skip: int | None) -> dict[str, Tensor]:
    """The last layer of one CLIP text encoder, normed, or that of a layer before it.

    diffusers' own way there breaks on transformers >= 5.6, whose text encoder has lost a level of names.
    """
    encoder = pipeline.text_encoder
    input_ids = tokens["tokenizer"].to(encoder.device)
    if clip_skip is None:
        return {"encoder_hidden_states": encoder(input_ids).last_hidden_state}
    hidden_states = encoder(input_ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    # the denoiser expects normed embeddings whichever layer they come from
    return {"encoder_hidden_states": getattr(encoder, "text_model", encoder).final_layer_norm(hidden_states)}


def read_two_clips(pipeline: Any, tokens: Mapping[str, Tensor], clip_skip: int | None) -> dict[str, Tensor]:
    """The last layers but one of two CLIP text encoders side by side, without a final norm, and the second's pooled."""
    said = [
        encoder(tokens[tokenizer].to(encoder.device), output_hidden_states=True)
        for tokenizer, encoder in (("tokenizer", pipeline.text_encoder), ("tokenizer_2", pipeline.text_encoder_2))
    ]
    layer = -((clip_skip or 0) + 2)
    return {
        "encoder_hidden_states": torch.cat([one.hidden_states[layer] for one in said], -1),
        "added_cond_kwargs.text_embeds": said[1].text_embeds,
    }


def read_no_size(_frame: Frame) -> dict[str, Tensor]:
    """Nothing: for families whose denoisers know nothing of sizes."""
    return {}


def read_time_ids(frame: Frame) -> dict[str, Tensor]:
    """Original size, corner and target size as six numbers, (6,) float32.

    Source: SDXL (arXiv:2307.01952), §2.2.
    """
    pairs = (frame.original[::-1], frame.corner[::-1], frame.target[::-1])  # height first
    return {"added_cond_kwargs.time_ids": torch.tensor([float(one) for pair in pairs for one in pair])}
