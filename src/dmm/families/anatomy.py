"""How a denoiser is asked, where its features are caught, and what of it a discriminator looks with: of UNets, and of
transformers whose blocks carry tokens of the picture beside those of the text.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A part of a denoiser whose output is a feature."""

    module: nn.Module
    pick: Callable[[Any], Tensor]
    """What of its output is the picture's: (B, ...)."""


@dataclass(frozen=True)
class Anatomy:
    """What is done with a denoiser."""

    ask: Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor]
    """Given it, x_t (B, C, H, W), timesteps (B,) from 0 to 1000 and the arguments of its call, what it predicts:
    (B, C, H, W), of one sign for all families."""
    blocks: Callable[[Any], dict[str, Block]]
    """By name, in order."""
    cut: Callable[[Any], Any]
    """A shallow copy that ends in the middle, and that ``look`` is called with."""
    look: Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor]
    """Given what ``cut`` left and the arguments of ``ask``, (B, D, h, w)."""
    width: Callable[[Any], int]
    """D of ``look``, of a whole denoiser."""


def first(output: Any) -> Tensor:
    """A block's output, or the first of several: down blocks also return what the skip connections carry."""
    return output[0] if isinstance(output, tuple) else output


def ask_unet(unet: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
    """A UNet's call."""
    output: Tensor = unet(x_t, timesteps, **given, return_dict=False)[0]
    return output


def unet_blocks(unet: Any) -> dict[str, Block]:
    """Every down block, the mid block and every up block, by name; a ControlNet has no up blocks."""
    modules: dict[str, nn.Module] = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    modules["mid_block"] = unet.mid_block
    modules |= {f"up_blocks.{i}": block for i, block in enumerate(getattr(unet, "up_blocks", ()))}
    return {name: Block(module, first) for name, module in modules.items()}


def _cut_unet(unet: Any) -> Any:
    kept = copy.copy(unet)
    kept._modules = dict(unet._modules)
    kept.up_blocks, kept.conv_norm_out, kept.conv_out = nn.ModuleList(), None, nn.Identity()
    return kept


UNET = Anatomy(
    ask=ask_unet,
    blocks=unet_blocks,
    cut=_cut_unet,
    look=ask_unet,
    width=lambda unet: int(unet.config.block_out_channels[-1]),
)


def second(output: Any) -> Tensor:
    """The picture's tokens of a block that returns the text's first, (B, N, D), each normalised.

    The residual streams of transformers have a few channels so large that they would be all of a mean square.
    """
    return normed(output[1])


def normed(tokens: Tensor) -> Tensor:
    """Tokens, (B, N, D), each of mean 0 and variance 1."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def every_fourth(blocks: nn.ModuleList, name: str, pick: Callable[[Any], Tensor] = second) -> dict[str, Block]:
    """The last of every four blocks, and of those that are left over, by their paths."""
    last = len(blocks) - 1
    return {f"{name}.{i}": Block(one, pick) for i, one in enumerate(blocks) if i % 4 == 3 or i == last}


def transformer_anatomy(
    ask: Callable[[Any, Tensor, Tensor, Mapping[str, Any]], Tensor],
    blocks: Callable[[Any], dict[str, Block]],
    *,
    list_name: str,
    emptied: tuple[str, ...] = (),
    pick_in: Callable[[Any], Callable[[Any], Tensor]] = lambda _: second,
    width: Callable[[Any], int],
) -> Anatomy:
    """The anatomy of a transformer.

    Args:
        ask, blocks, width: see :class:`Anatomy`.
        list_name: of the list of blocks that is cut in half.
        emptied: lists of blocks behind that one, which a cut denoiser has none of.
        pick_in: given a denoiser, what picks the picture's tokens, (B, h w, D), of the output of a block in that list.
    """

    def cut(denoiser: Any) -> Any:
        kept = copy.copy(denoiser)
        kept._modules = dict(denoiser._modules)
        whole = getattr(denoiser, list_name)
        setattr(kept, list_name, whole[: max(1, len(whole) // 2)])
        for name in emptied:
            setattr(kept, name, nn.ModuleList())
        return kept

    def look(denoiser: Any, x_t: Tensor, timesteps: Tensor, given: Mapping[str, Any]) -> Tensor:
        caught: list[Tensor] = []
        pick = pick_in(denoiser)
        hook = getattr(denoiser, list_name)[-1].register_forward_hook(lambda _, __, output: caught.append(pick(output)))
        try:
            ask(denoiser, x_t, timesteps, given)
        finally:
            hook.remove()
        (tokens,) = caught
        # what is left of the picture's sides is in their ratio
        side = math.sqrt(tokens.shape[1] * x_t.shape[2] / x_t.shape[3])
        return tokens.transpose(1, 2).unflatten(2, (round(side), -1)).to(x_t.dtype)

    return Anatomy(ask=ask, blocks=blocks, cut=cut, look=look, width=width)
