"""Z-Image and Z-Image-Turbo."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmm.families.anatomy import Block, every_fourth, transformer_anatomy
from dmm.families.tokens import ahead_of_text, remember_count

PATCH = 2


def ask_z_image(z_image: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Ask as ``ZImagePipeline`` does: pictures and captions as lists, time from noise to picture, the sign turned.

    Args:
        given: ``cap_feats`` (B, T, D), of which the first ``lengths_ids`` (B,) are a caption's.
    """
    height, width = x_t.shape[-2:]
    remember_count(z_image, (height // PATCH) * (width // PATCH))
    captions = [
        caption[:length] for caption, length in zip(given["cap_feats"], given["lengths_ids"].tolist(), strict=True)
    ]
    pictures = list(x_t.unsqueeze(2).unbind())
    output = z_image(pictures, (1000 - timesteps) / 1000, captions, return_dict=False)[0]
    return -torch.stack(output).squeeze(2)


def _blocks(z_image: Any) -> dict[str, Block]:
    pick = ahead_of_text(z_image)
    return {
        **every_fourth(z_image.noise_refiner, "noise_refiner", pick),
        **every_fourth(z_image.layers, "layers", pick),
    }


Z_IMAGE_ANATOMY = transformer_anatomy(
    ask_z_image,
    _blocks,
    list_name="layers",
    pick_in=ahead_of_text,
    width=lambda z_image: int(z_image.config.dim),
)
