"""Qwen-Image."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dmm.families.anatomy import every_fourth, second, transformer_anatomy
from dmm.families.tokens import head_width, packed, unpacked


def ask_qwen_image(qwen: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Ask as ``QwenImagePipeline`` does.

    Args:
        given: ``encoder_hidden_states`` (B, T, D), and ``mask_ids`` (B, T): 1 where there is text.
    """
    height, width = x_t.shape[-2:]
    mask = given["mask_ids"]
    output = qwen(
        hidden_states=packed(x_t),
        timestep=timesteps.to(x_t.dtype) / 1000,
        encoder_hidden_states=given["encoder_hidden_states"],
        encoder_hidden_states_mask=None if bool(mask.all()) else mask,
        img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
        return_dict=False,
    )[0]
    return unpacked(output, height, width)


QWEN_IMAGE_ANATOMY = transformer_anatomy(
    ask_qwen_image,
    lambda qwen: every_fourth(qwen.transformer_blocks, "transformer_blocks", second),
    list_name="transformer_blocks",
    width=head_width,
)
