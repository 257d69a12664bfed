"""What a UNet reads of a prompt, as named tensors: tokens first, then their embeddings.

The names are those of the UNet's keyword arguments, so that a family that reads more adds a name.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmm.errors import UserError


def tokenize(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """What a pipeline's text encoder is given.

    Returns: (B, T) int64 on the CPU, padded to the T tokens that the text encoder reads; what is longer is cut.
    """
    tokenizer = pipeline.tokenizer
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    input_ids: Tensor = tokens.input_ids
    return input_ids


def num_cut(pipeline: Any, prompts: Sequence[str]) -> int:
    """How many prompts are longer than the text encoder reads."""
    tokenizer = pipeline.tokenizer
    return sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(list(prompts), verbose=False).input_ids)


@torch.no_grad()
def encode_tokens(pipeline: Any, input_ids: Tensor, clip_skip: int | None = None) -> dict[str, Tensor]:
    """Embed tokens as the pipeline's own ``encode_prompt`` does.

    Args:
        input_ids: (B, T), of :func:`tokenize`.
        clip_skip: how many of the text encoder's last layers are left out, as diffusers counts them: 1 takes the
            output of the last but one. (diffusers' own way there breaks on transformers >= 5.6, whose text encoder
            has lost a level of names.)
    Returns: ``encoder_hidden_states``, (B, T, D), on the text encoder's device and in its dtype.
    Raises: UserError: see :func:`check_clip_skip`.
    """
    encoder = pipeline.text_encoder
    input_ids = input_ids.to(encoder.device)
    if clip_skip is None:
        return {"encoder_hidden_states": encoder(input_ids).last_hidden_state}
    check_clip_skip(pipeline, clip_skip)
    hidden_states = encoder(input_ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    # the UNet expects normed embeddings whichever layer they come from
    return {"encoder_hidden_states": getattr(encoder, "text_model", encoder).final_layer_norm(hidden_states)}


def check_clip_skip(pipeline: Any, clip_skip: int | None) -> None:
    """Refuse a number of layers that the text encoder does not have to spare.

    Raises: UserError: it is below 1, or would leave no layer.
    """
    layers = pipeline.text_encoder.config.num_hidden_layers
    if clip_skip is not None and not 1 <= clip_skip < layers:
        raise UserError(
            f"clip_skip is {clip_skip}, but the text encoder has {layers} layers: choose from 1 (leave out the last) "
            f"to {layers - 1}, or none."
        )
