"""Adapters that run beside the weights: a style for each image of a batch, or while the adapter itself is trained.

Each layer's output gets what its own change adds: for a linear layer or a convolution W x, up (down x) and the bias's
offset; a norm gives its normalised input another scale and shift. The weights are not touched, and modules keep their
class: what is added, a forward hook adds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmm.models.adapters import Adapter


@dataclass
class Prompts:
    """What a text encoder is reading.

    Attributes:
        count: P, prompts; each is that of one image, or of as many as every other.
    """

    count: int = 0


@dataclass(frozen=True)
class Change:
    """What several styles change of one module.

    Attributes:
        up: (U, out, rank), of U styles; None where they do not change its weight.
        down: (U, rank, in, ...).
        offsets: by parameter's own name, (U, n).
        index: (S,) int64, which of the U each image of a batch of S has; None where U is 1 and all have it.
        prompts: of a text encoder, what it is reading, in place of a batch of images.
    """

    up: Tensor | None
    down: Tensor | None
    offsets: Mapping[str, Tensor]
    index: Tensor | None
    prompts: Prompts | None = None


def set_changes(model: nn.Module, changes: Mapping[str, Change]) -> None:
    """Let a model's modules add changes to what they say, in place of those that they have added so far.

    Args:
        changes: by the module's name.
    """
    for name, module in model.named_modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Hook | _Count):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        change = changes.get(name.replace(".base_layer", ""))
        if change is None or name + ".base_layer" in changes:
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(_Beside(change))
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(_LookedUp(change))
        else:
            affine = _Affine(change)
            module.register_forward_pre_hook(_Bare(affine))
            module.register_forward_hook(affine, always_call=True)
    prompts = next((one.prompts for one in changes.values() if one.prompts), None)
    if prompts:
        model.register_forward_pre_hook(_Count(prompts), with_kwargs=True)


def changes_of(
    adapters: Sequence[Adapter], index: Tensor | None = None, *, prompts: Prompts | None = None
) -> dict[str, Change]:
    """What adapters change, by module.

    Args:
        adapters: of U styles.
        index, prompts: see :class:`Change`.
    """
    assert index is not None or len(adapters) == 1
    names = dict.fromkeys(name for one in adapters for name in (*one.factors, *one.offsets))
    modules: dict[str, set[str]] = {}
    for name in names:
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, set()).add(parameter)
    return {name: _change(adapters, name, parameters, index, prompts) for name, parameters in modules.items()}


def _change(
    adapters: Sequence[Adapter], module: str, parameters: set[str], index: Tensor | None, prompts: Prompts | None
) -> Change:
    name = f"{module}.weight"
    up, down = _stack([one.factors.get(name) for one in adapters])
    offsets = {}
    for parameter in sorted(parameters):
        found = [one.offsets.get(f"{module}.{parameter}") for one in adapters]
        like = next((one for one in found if one is not None), None)
        if like is not None:
            offsets[parameter] = torch.stack([torch.zeros_like(like) if one is None else one for one in found])
    return Change(up, down, offsets, index, prompts)


def _stack(factors: Sequence[Any]) -> tuple[Tensor | None, Tensor | None]:
    """Factors of several styles, padded by zeros to one rank."""
    some = next((one for one in factors if one is not None), None)
    if some is None:
        return None, None
    if len(factors) == 1:
        return some.up[None], some.down[None]
    rank = max(one.rank for one in factors if one is not None)
    ups, downs = [], []
    for one in factors:
        if one is None:
            ups.append(some.up.new_zeros(len(some.up), rank))
            downs.append(some.down.new_zeros(rank, *some.down.shape[1:]))
        else:
            ups.append(F.pad(one.up, (0, rank - one.rank)))
            downs.append(torch.cat([one.down, one.down.new_zeros(rank - one.rank, *one.down.shape[1:])]))
    return torch.stack(ups), torch.stack(downs)


class _Hook:
    """By which :func:`set_changes` knows its own."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def for_batch(self, tensor: Tensor, batch: int) -> Tensor:
        """What is kept by style, by image of a batch: (1, ...) or (S, ...)."""
        index = self.change.index
        if index is None:
            return tensor
        if self.change.prompts:
            return tensor[_by_prompt(index, self.change.prompts.count).to(tensor.device)]
        blocks, rest = divmod(batch, len(index))
        if len(index) == 1:  # whatever a model makes of its batch: some put all tokens of it in a row
            return tensor[index.to(tensor.device)]
        if rest or not 1 <= blocks <= 3:
            raise ValueError(
                f"{len(index)} styles were set, one for each image, and the model is given a batch of {batch}: set one "
                "style for all, or as many as images in a batch."
            )
        return tensor[index.to(tensor.device)]


class _Count:
    """Before a text encoder: counts the prompts that it is given."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts

    def __call__(self, _module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self._prompts.count = len(given[0] if given else named["input_ids"])


def _by_prompt(index: Tensor, num_prompts: int) -> Tensor:
    """Which style each prompt is read in, (P,), where each image has a style, (S,), and each prompt S / P of them."""
    if len(index) == 1:
        return index
    if len(index) % num_prompts:
        raise ValueError(
            f"{len(index)} styles were set, one for each image, and {num_prompts} prompts are read: set one style for "
            "all, or as many as prompts x images per prompt."
        )
    by_prompt = index.reshape(num_prompts, -1)
    if not (by_prompt == by_prompt[:, :1]).all():
        raise ValueError(
            "Images of one prompt have styles whose text encoders differ, and a prompt is read once for all its "
            "images: give each image a prompt of its own, the same one as often as it is painted."
        )
    return by_prompt[:, 0]


class _Beside(_Hook):
    """Of a linear layer or a convolution."""

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change, x = self.change, inputs[0]
        if change.up is not None and change.down is not None:
            up, down = (self.for_batch(one, len(x)).to(x.device) for one in (change.up, change.down))
            kind = x.device.type  # of which some, as "meta", know no autocast
            if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
                up, down = up.to(x.dtype), down.to(x.dtype)
            low_rank = _linear if isinstance(module, nn.Linear) else _convolve
            output = output + low_rank(module, x, up, down)
        if "bias" in change.offsets:
            bias = self.for_batch(change.offsets["bias"], len(x)).to(x.device)
            output = output + _along(output, bias, last=isinstance(module, nn.Linear)).to(output.dtype)
        return output


def _along(output: Tensor, values: Tensor, *, last: bool) -> Tensor:
    """Values by channel, (n, C), in the form that an output of B samples, C its last or second axis, takes."""
    ones = (1,) * (output.ndim - 2)
    values = values.reshape(len(values), *ones, -1) if last else values.reshape(len(values), -1, *ones)
    if len(values) == 1:
        return values
    return values.repeat(len(output) // len(values), *(1,) * (output.ndim - 1))


def _linear(_: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    if len(up) == 1:
        return F.linear(F.linear(x, down[0]), up[0])
    rows = x.reshape(-1, len(up), x[0].numel() // x.shape[-1], x.shape[-1])
    return (rows @ down.mT @ up.mT).reshape(*x.shape[:-1], up.shape[1])


def _convolve(conv: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    settings = (None, conv.stride, conv.padding, conv.dilation)
    if len(up) == 1:
        return F.conv2d(F.conv2d(x, down[0], *settings), up[0][:, :, None, None])
    num_images, rank = down.shape[:2]
    # a group of channels for each image
    side_by_side = x.reshape(-1, num_images * x.shape[1], *x.shape[2:])
    low = F.conv2d(side_by_side, down.flatten(0, 1), *settings, groups=num_images)
    height, width = low.shape[2:]
    high = up @ low.reshape(-1, num_images, rank, height * width)
    return high.reshape(len(x), -1, height, width)


class _LookedUp(_Hook):
    """Of an embedding, which takes rows of its weight."""

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        up, down, ids = self.change.up, self.change.down, inputs[0]
        if up is None or down is None:
            return output
        up, down = (self.for_batch(one, len(ids)).to(output) for one in (up, down))
        if len(up) == 1:
            return output + F.embedding(ids, up[0]) @ down[0]
        ids = ids.expand(len(up), -1)  # positions are the same for all prompts
        return output + up[torch.arange(len(up), device=ids.device)[:, None], ids] @ down


class _Affine(_Hook):
    """Of a norm: scales and shifts what :class:`_Bare` has let it normalise only."""

    def __init__(self, change: Change) -> None:
        super().__init__(change)
        self.own: dict[str, Any] = {}

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None) -> Tensor | None:
        own, self.own = self.own, {}
        module._parameters.update(own)
        if output is None:  # it has failed
            return None
        for name, put in (("weight", torch.mul), ("bias", torch.add)):
            value = own.get(name)
            if value is None:
                continue
            value = value[None]
            if name in self.change.offsets:
                value = value + self.for_batch(self.change.offsets[name], len(output)).to(value.device)
            # a group norm's channels come second, a layer norm's last
            output = put(output, _along(output, value, last=not isinstance(module, nn.GroupNorm)).to(output.dtype))
        return output


class _Bare(_Hook):
    """Before a norm: takes its scale and shift off."""

    def __init__(self, affine: _Affine) -> None:
        super().__init__(affine.change)
        self._affine = affine

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._affine.own = {name: module._parameters[name] for name in ("weight", "bias") if name in module._parameters}
        module._parameters.update(dict.fromkeys(self._affine.own))
