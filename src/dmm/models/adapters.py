"""Adapters: what a style changes of the weights that all styles share, and how models come to paint with it.

A layer's weight W of a style is W + up @ down, of low rank; every other parameter (a bias, a norm's scale) has its
difference in full. A mix with weights w_i is W + sum_i w_i up_i @ down_i. One mix for all images is *fused* into the
weights, which are kept beside and come back to the bit; a mix for each image of a batch, or of one of several models
that share their weights, runs *unfused*: see :mod:`dmm.models.unfused`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmm.errors import UserError


@dataclass(frozen=True)
class Factors:
    """A low-rank change of a layer's weight.

    Attributes:
        up: (out, rank).
        down: (rank, in, ...), as the weight has its inputs.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """How many products it sums."""
        return len(self.down)

    def product(self) -> Tensor:
        """The change, (out, in, ...)."""
        return (self.up @ self.down.flatten(1)).reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """What a style, or a mix, changes of a model.

    Attributes:
        factors: of layers' weights, by the parameter's name.
        offsets: the whole differences of other parameters, by name.
    """

    factors: Mapping[str, Factors]
    offsets: Mapping[str, Tensor]

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        of_layers = sum(one.up.numel() + one.down.numel() for one in self.factors.values())
        return of_layers + sum(offset.numel() for offset in self.offsets.values())

    def change(self, name: str) -> Tensor:
        """The whole change of a parameter that it changes."""
        return self.factors[name].product() if name in self.factors else self.offsets[name]

    def to(self, *args: Any) -> "Adapter":
        """Its tensors on another device or in another dtype, as ``Tensor.to`` has it."""
        factors = {name: Factors(one.up.to(*args), one.down.to(*args)) for name, one in self.factors.items()}
        return Adapter(factors, {name: offset.to(*args) for name, offset in self.offsets.items()})


NOTHING = Adapter({}, {})
"""What no style changes."""


def mix_adapters(parts: Sequence[tuple[float, Adapter]]) -> Adapter:
    """The adapter that changes what several do together, each times its weight: exact, at the sum of their ranks."""
    parts = [(weight, adapter) for weight, adapter in parts if weight]
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    factors: dict[str, list[Factors]] = {}
    offsets: dict[str, Tensor] = {}
    for weight, adapter in parts:
        for name, one in adapter.factors.items():
            factors.setdefault(name, []).append(Factors(one.up * weight, one.down))
        for name, offset in adapter.offsets.items():
            offsets[name] = offsets[name] + offset * weight if name in offsets else offset * weight
    return Adapter(
        {
            name: Factors(torch.cat([one.up for one in of_layer], dim=1), torch.cat([one.down for one in of_layer]))
            for name, of_layer in factors.items()
        },
        offsets,
    )


class KeptWeights:
    """The shared weights of what has been fused over: they wait in CPU memory, whatever the model's device."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def fuse(self, model: nn.Module, adapter: Adapter) -> None:
        """Give a model the weights of a style or mix in place of those that it has; of none, its own to the bit.

        Raises: UserError: weights that would change are on no device, as sequential offloading has them.
        """
        parameters = parameters_by_name(model)
        names = [*adapter.factors, *adapter.offsets]
        for name in names:
            if parameters[name].is_meta:
                raise UserError(
                    "The weights are offloaded layer by layer, where no style can be fused into them. Choose the style "
                    "first, or use enable_model_cpu_offload."
                )
        for name in self._kept.keys() - set(names):
            parameters[name].copy_(self._kept.pop(name))
        for name in names:
            weight = parameters[name]
            if name not in self._kept:
                self._kept[name] = weight.detach().to("cpu", copy=True)
            add_change(weight, self._kept[name], adapter, name)

    def __getitem__(self, name: str) -> Tensor | None:
        """What a parameter is without a style, where that is not what the model has of it now."""
        return self._kept.get(name)


def add_change(weight: Tensor, base: Tensor, adapter: Adapter, name: str) -> None:
    """Make a weight ``base`` plus what an adapter changes of it; rounded once to the weight's dtype.

    Args:
        weight: is written.
        base: of its shape and dtype, on any device.
    """
    if name in adapter.offsets:
        weight.copy_((base.float() + adapter.offsets[name].float().to(base.device)).to(weight.dtype))
        return
    factors = adapter.factors[name]
    dtype = torch.float32 if weight.dtype == torch.float16 and weight.device.type == "cpu" else weight.dtype
    up, down = (one.to(weight.device, dtype) for one in (factors.up, factors.down.flatten(1)))
    flat = base.to(weight.device, dtype).flatten(1)
    weight.copy_(torch.addmm(flat, up, down).reshape(weight.shape))


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by the names that they have without PEFT's layers around them."""
    return dict(_plain_names(model))


def _plain_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name.replace(".base_layer.", "."), parameter
