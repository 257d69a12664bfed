"""The student: a stock UNet and the style prompts, which may grow and shrink, as one module that is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmm.errors import UserError, nearest
from dmm.models.features import BlockTap
from dmm.models.styles import StylePrompts, attach_styles, styled_embedding


@dataclass(frozen=True)
class StudentOutput:
    """What the student says of B samples.

    Attributes:
        prediction: (B, C, H, W), of the student's prediction type.
        features: block name to (B, C_block, H_block, W_block).
    """

    prediction: Tensor
    features: dict[str, Tensor]


def grow(style_prompts: StylePrompts, names: Sequence[str]) -> StylePrompts:
    """Style prompts with further styles, whose rows are drawn as all rows once were; the earlier ones stay as they are.

    Args:
        names: of the styles that are new.
    Source: DMM §3.5.
    """
    grown = StylePrompts([*style_prompts.names, *names], style_prompts.config.dim)
    state = style_prompts.state_dict()
    earlier = state.pop("embeddings")
    with torch.no_grad():
        grown.embeddings[: len(earlier)] = earlier
    grown.load_state_dict({**state, "embeddings": grown.embeddings.detach()})
    return grown


def shrink(style_prompts: StylePrompts, name: str) -> StylePrompts:
    """Style prompts without one style; the others stay as they are.

    Raises: UserError: there is no style of that name, or no other.
    """
    names = style_prompts.names
    if name not in names:
        raise UserError(f"There is no style '{name}'{nearest(name, names)}; the styles are {', '.join(names)}.")
    if len(names) == 1:
        raise UserError(f"'{name}' is the only style: without it nothing is left to choose from.")
    kept = [i for i, one in enumerate(names) if one != name]
    shrunk = StylePrompts([names[i] for i in kept], style_prompts.config.dim)
    shrunk.load_state_dict({**style_prompts.state_dict(), "embeddings": style_prompts.embeddings.detach()[kept]})
    shrunk.provenance = [one for one in style_prompts.provenance if one.name != name]
    return shrunk


class StyledStudent(nn.Module):
    """UNet and style prompts as children of one module: what DDP wraps.

    Were the style term computed outside of the wrapped module, the codebook's gradient would never be
    synchronised.

    Args:
        unet: a stock UNet; styles are attached to it.
        style_prompts: as wide as the UNet's timestep embedding.
    Raises: UserError: the widths differ.
    """

    def __init__(self, unet: Any, style_prompts: StylePrompts) -> None:
        super().__init__()
        attach_styles(unet, style_prompts)
        self.unet = unet
        self.style_prompts = style_prompts
        self._tap = BlockTap(unet)

    def forward(
        self, x_t: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], style_weights: Tensor
    ) -> StudentOutput:
        """Predict with a style for each sample.

        Args:
            x_t: (B, C, H, W).
            timesteps: (B,).
            conditioning: keyword arguments of the UNet, such as ``encoder_hidden_states``, (B, T, D).
            style_weights: (B, N).
        """
        embedding = styled_embedding(self.unet)
        assert embedding is not None
        embedding.term = self.style_prompts(style_weights)
        try:
            with self._tap.catch() as features:
                prediction = self.unet(x_t, timesteps, **conditioning, return_dict=False)[0]
        finally:
            embedding.term = None
        return StudentOutput(prediction, dict(features))
