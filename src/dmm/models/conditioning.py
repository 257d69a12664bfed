"""What a pipeline's denoiser reads of prompts, as named tensors: tokens first, then their embeddings.

The names are those of :mod:`dmm.families.conditioning`; what they are is the family's business.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Component, components_of, family_of


def tokenize(pipeline: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What a pipeline's text encoders are given.

    Returns: by tokenizer, (B, T) int64 on the CPU, padded to the T tokens that its text encoder reads; what is longer
        is cut.
    """
    found = {}
    for reader in components_of(pipeline):
        if not reader.tokenizer:
            continue
        tokenizer = getattr(pipeline, reader.tokenizer)
        tokens = tokenizer(
            _given(reader, tokenizer, prompts),
            padding="max_length",
            max_length=reader.num_tokens or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        found[reader.tokenizer] = tokens.input_ids
        if reader.template:
            found[f"{reader.tokenizer}_mask"] = tokens.attention_mask
    return found


def _given(reader: Component, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """What a text encoder's tokenizer makes tokens of."""
    return [reader.template(tokenizer, prompt) if reader.template else prompt for prompt in prompts]


def num_cut(pipeline: Any, prompts: Sequence[str]) -> int:
    """How many prompts are longer than the text encoders read."""
    readers = [(one, getattr(pipeline, one.tokenizer)) for one in components_of(pipeline) if one.tokenizer]
    given = (tokenizer(_given(reader, tokenizer, prompts), verbose=False) for reader, tokenizer in readers)
    counted = zip(*(tokens.input_ids for tokens in given), strict=True)
    most = [reader.num_tokens or tokenizer.model_max_length for reader, tokenizer in readers]
    return sum(any(len(ids) > length for ids, length in zip(of_prompt, most, strict=True)) for of_prompt in counted)


@torch.no_grad()
def encode_tokens(pipeline: Any, tokens: Mapping[str, Tensor], clip_skip: int | None = None) -> dict[str, Tensor]:
    """Embed tokens as the pipeline's own ``encode_prompt`` does.

    Args:
        tokens: of :func:`tokenize`.
        clip_skip: how many of the text encoders' last layers are left out, as diffusers counts them: 1 takes the
            layer before the one that the family reads.
    Returns: such as ``encoder_hidden_states``, (B, T, D), on the text encoders' device and in their dtype.
    Raises: UserError: see :func:`check_clip_skip`.
    """
    check_clip_skip(pipeline, clip_skip)
    return family_of(pipeline).read_tokens(pipeline, tokens, clip_skip)


def encode_captions(pipeline: Any, captions: Sequence[str], clip_skip: int | None = None) -> dict[str, Tensor]:
    """Embed captions, of which the empty one is what guidance leads away from where sampling has no negative prompt.

    Pipelines that say ``force_zeros_for_empty_prompt`` take zeros then, not what the text encoders make of no words.

    Returns: as :func:`encode_tokens`.
    """
    encoded = encode_tokens(pipeline, tokenize(pipeline, captions), clip_skip)
    if takes_zeros(pipeline):
        empty = torch.tensor([not caption for caption in captions])
        encoded = {
            name: tensor.masked_fill(empty.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1)), 0)
            for name, tensor in encoded.items()
        }
    return encoded


def takes_zeros(pipeline: Any) -> bool:
    """Whether a pipeline's unconditional embedding is zeros."""
    return bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False))


def check_clip_skip(pipeline: Any, clip_skip: int | None) -> None:
    """Refuse a number of layers that the text encoders do not have to spare.

    Args:
        pipeline: or anything that has its parts' skeletons.
    Raises: UserError: it is below 1, or would leave no layer.
    """
    if clip_skip is None:
        return
    family = family_of(pipeline)
    if not family.reads_layers:
        raise UserError(
            f"clip_skip is {clip_skip}, but {family.title} reads no layers of CLIP, only the embedding of the whole "
            "prompt. Leave clip_skip out."
        )
    clips = [getattr(pipeline, one.name) for one in family.text_encoders if one.num_tokens is None]
    layers = min(one.config.num_hidden_layers for one in clips)
    layers -= family.layers_left_out
    if not 1 <= clip_skip < layers:
        raise UserError(
            f"clip_skip is {clip_skip}, but the text encoder has {layers} layers: choose from 1 (leave out the last) "
            f"to {layers - 1}, or none."
        )
