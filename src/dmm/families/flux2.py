"""FLUX.2 klein, base and distilled."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmm.families.anatomy import Block, transformer_anatomy
from dmm.families.tokens import behind_text, grid, head_width, remember_count, two_kinds


def ask_flux2(flux2: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Ask as ``Flux2KleinPipeline`` does: each place of the latents, of 128 channels, is a token.

    Text has places of its own, on a fourth axis.
    """
    height, width = x_t.shape[-2:]
    remember_count(flux2, height * width)
    text = given["encoder_hidden_states"]
    text_ids = torch.zeros(text.shape[1], 4, device=x_t.device)
    text_ids[:, 3] = torch.arange(text.shape[1], device=x_t.device)
    output = flux2(
        hidden_states=x_t.flatten(2).transpose(1, 2),
        timestep=timesteps.to(x_t.dtype) / 1000,
        img_ids=grid(height, width, 4, x_t.device),
        txt_ids=text_ids,
        guidance=None,
        **given,
        return_dict=False,
    )[0]
    picture: Tensor = output.transpose(1, 2).unflatten(2, (height, width))
    return picture


def _blocks(flux2: Any) -> dict[str, Block]:
    return two_kinds(flux2, behind_text(flux2))


FLUX2_ANATOMY = transformer_anatomy(
    ask_flux2,
    _blocks,
    list_name="transformer_blocks",
    emptied=("single_transformer_blocks",),
    width=head_width,
)
