"""The multi-class discriminator: it tells of which teacher an image is, or of the student in which style.

Classes 0 to N - 1 are the teachers, N to 2 N - 1 the student in their styles (DMM §3.3, §A.2). What the
paper leaves open is decided so:

- The backbone is the first half of the base's denoiser, a UNet's down blocks and middle block, frozen; the head
  alone is trained. A frozen backbone cannot be led astray by a young student, costs neither gradients nor optimizer
  state, and what it makes of an image need be computed once for both of a step's updates.
- It reads the caption that the student reads, as the base's text encoder does, and dropped where the student's is.
- The clean latents that it judges are diffused again to a timestep s that is drawn uniformly from t on, t being
  where the student and the teacher predicted them (see :func:`dmm.maths.diffusion.rediffuse`): what it sees, and
  the gradient that it gives, are then bounded whatever t is.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmm.families import anatomy_of, arguments
from dmm.models.teachers import freeze


class Discriminator(nn.Module):
    """A frozen backbone that looks, and a head that judges.

    Args:
        denoiser: of the base; copied, and cut after its middle block.
        num_styles: N.
        dtype: of the backbone's weights; the head's are float32.
        seed: of the head's weights.
    """

    backbone: Any  # half a denoiser, whose methods the type of a submodule would hide

    def __init__(self, denoiser: Any, num_styles: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        anatomy = anatomy_of(denoiser)
        self.backbone = freeze(copy.deepcopy(anatomy.cut(denoiser)).to(dtype))
        self._look = anatomy.look
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = build_head(anatomy.width(denoiser), num_styles)

    def look(self, x_s: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """What the head judges of noised latents.

        Args:
            x_s: (B, C, H, W); gradients pass through to it.
            timesteps: (B,).
            conditioning: what the base's denoiser reads, by flat names.
        Returns: (B, C_mid, H_mid, W_mid).
        """
        dtype = next(self.backbone.parameters()).dtype
        return self._look(self.backbone, x_s.to(dtype), timesteps, arguments(conditioning, dtype))

    def judge_frozen(self, seen: Tensor) -> Tensor:
        """The head's logits, (B, 2 N), with no gradient to its weights: what the student is trained against."""
        weights = {name: tensor.detach() for name, tensor in self.head.state_dict(keep_vars=True).items()}
        logits: Tensor = torch.func.functional_call(self.head, weights, (seen.float(),))
        return logits


def build_head(channels: int, num_styles: int) -> nn.Module:
    """Two convolutions, normalised, and a projection of their mean over places, so that any size will do.

    Args:
        channels: of the middle block.
        num_styles: N.
    Returns: (B, channels, h, w) float32 -> logits, (B, 2 N).
    """
    width = min(channels, 256)
    groups = math.gcd(32, width)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 2 * num_styles),
    )
