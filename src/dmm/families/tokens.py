"""Latents as the tokens that transformers read, and back; and which of a block's tokens are the picture's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmm.families.anatomy import Block, every_fourth, normed, second

_COUNT = "num_picture_tokens"


def packed(x: Tensor) -> Tensor:
    """Squares of 2 x 2 as tokens: (B, C, H, W) -> (B, H W / 4, 4 C)."""
    batch, channels, height, width = x.shape
    squares = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`packed`."""
    batch, _, size = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, size // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // 4, height, width)


def grid(height: int, width: int, num_axes: int, device: torch.device) -> Tensor:
    """Where each token of a picture is: (height width, num_axes), its row and column behind a zero, zeros behind."""
    ids = torch.zeros(height, width, num_axes, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.reshape(height * width, num_axes)


def remember_count(denoiser: Any, count: int) -> None:
    """Note how many tokens of a call are the picture's, for blocks whose output holds the text's too."""
    vars(denoiser)[_COUNT] = count  # no buffer: nothing of a model is saved with it


def ahead_of_text(denoiser: Any) -> Callable[[Any], Tensor]:
    """Of a denoiser's blocks: the picture's tokens, normalised, which come first, (B, N, D)."""
    return lambda output: normed(output[:, : vars(denoiser)[_COUNT]])


def behind_text(denoiser: Any) -> Callable[[Any], Tensor]:
    """The same where they come last."""
    return lambda output: normed(output[:, -vars(denoiser)[_COUNT] :])


def two_kinds(
    denoiser: Any, pick_of_single: Callable[[Any], Tensor] = second, pick: Callable[[Any], Tensor] = second
) -> dict[str, Block]:
    """Every fourth of blocks that keep text and picture apart, and of those that join them."""
    double: nn.ModuleList = denoiser.transformer_blocks
    single: nn.ModuleList = denoiser.single_transformer_blocks
    return {
        **every_fourth(double, "transformer_blocks", pick),
        **every_fourth(single, "single_transformer_blocks", pick_of_single),
    }


def head_width(denoiser: Any) -> int:
    """The width of the residual stream, of a config that counts heads."""
    return int(denoiser.config.num_attention_heads * denoiser.config.attention_head_dim)
