"""FLUX.1, dev and schnell."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmm.families.anatomy import transformer_anatomy
from dmm.families.tokens import grid, head_width, packed, two_kinds, unpacked

GUIDANCE = 3.5
"""Scale that a guidance-distilled model is asked at where nothing else is said: its pipeline's."""


def ask_flux(flux: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Pack, place, ask, unpack: as ``FluxPipeline`` does, which tells timesteps from 0 to 1."""
    height, width = x_t.shape[-2:]
    given = dict(given)
    if flux.config.guidance_embeds:
        given.setdefault("guidance", torch.full((len(x_t),), GUIDANCE, device=x_t.device))
    else:
        given.pop("guidance", None)
    text = given["encoder_hidden_states"]
    output = flux(
        hidden_states=packed(x_t),
        timestep=timesteps.to(x_t.dtype) / 1000,
        img_ids=grid(height // 2, width // 2, 3, x_t.device),
        txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
        **given,
        return_dict=False,
    )[0]
    return unpacked(output, height, width)


FLUX_ANATOMY = transformer_anatomy(
    ask_flux,
    two_kinds,
    list_name="transformer_blocks",
    emptied=("single_transformer_blocks",),
    width=head_width,
)
