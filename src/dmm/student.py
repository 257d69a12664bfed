"""The student: a stock UNet and the style prompts, as one module that is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dmm.features import BlockTap
from dmm.styles import StylePrompts, attach_styles, styled_embedding


@dataclass(frozen=True)
class StudentOutput:
    """What the student says of B samples.

    Attributes:
        prediction: (B, C, H, W), of the student's prediction type.
        features: block name to (B, C_block, H_block, W_block).
    """

    prediction: Tensor
    features: dict[str, Tensor]


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
