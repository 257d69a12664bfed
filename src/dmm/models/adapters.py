"""Adapters: what a style changes of the weights that all styles share, and how models come to paint with it.

A layer's weight W of a style is W + up @ down, of low rank; every other parameter (a bias, a norm's scale) has its
difference in full. A mix with weights w_i is W + sum_i w_i up_i @ down_i. One mix for all images is *fused* into the
weights, which are kept beside and come back to the bit; a mix for each image of a batch, or of one of several models
that share their weights, runs *unfused*: see :mod:`dmm.models.unfused`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        return (self.up.float() @ self.down.float().flatten(1)).reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """What a style, or a mix, changes of a model.

    Attributes:
        factors: of layers' weights, by the parameter's name.
        offsets: the whole differences of other parameters, by name.
        text: what it changes of the text encoders that read for the model, by component; see
            :mod:`dmm.models.text_adapters`.
    """

    factors: Mapping[str, Factors]
    offsets: Mapping[str, Tensor]
    text: Mapping[str, "Adapter"] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        of_layers = sum(one.up.numel() + one.down.numel() for one in self.factors.values())
        of_text = sum(one.num_parameters for one in self.text.values())
        return of_layers + sum(offset.numel() for offset in self.offsets.values()) + of_text

    def change(self, name: str) -> Tensor:
        """The whole change of a parameter that it changes, float32."""
        return self.factors[name].product() if name in self.factors else self.offsets[name].float()

    def to(self, *args: Any) -> "Adapter":
        """Its tensors on another device or in another dtype, as ``Tensor.to`` has it."""
        factors = {name: Factors(one.up.to(*args), one.down.to(*args)) for name, one in self.factors.items()}
        offsets = {name: offset.to(*args) for name, offset in self.offsets.items()}
        return Adapter(factors, offsets, {component: one.to(*args) for component, one in self.text.items()})


NOTHING = Adapter({}, {})
"""What no style changes."""


def mix_adapters(parts: Sequence[tuple[float, Adapter]]) -> Adapter:
    """The adapter that changes what several do together, each times its weight: exact, at the sum of their ranks.

    Returns: float32, unless it is one of them as it is.
    """
    parts = [(weight, adapter) for weight, adapter in parts if weight]
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    factors: dict[str, list[Factors]] = {}
    offsets: dict[str, Tensor] = {}
    for weight, adapter in parts:
        for name, one in adapter.factors.items():
            factors.setdefault(name, []).append(Factors(one.up.float() * weight, one.down.float()))
        for name, offset in adapter.offsets.items():
            part = offset.float() * weight
            offsets[name] = offsets[name] + part if name in offsets else part
    components = dict.fromkeys(component for _, adapter in parts for component in adapter.text)
    return Adapter(
        {
            name: Factors(torch.cat([one.up for one in of_layer], dim=1), torch.cat([one.down for one in of_layer]))
            for name, of_layer in factors.items()
        },
        offsets,
        {
            component: mix_adapters([(weight, one.text[component]) for weight, one in parts if component in one.text])
            for component in components
        },
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

    def of(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of a model as they are without a style, by name, whatever is fused."""
        return {**parameters_by_name(model), **self._kept}


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


def check_adapter(model: nn.Module, adapter: Adapter, where: str) -> None:
    """Refuse an adapter that was made for another model.

    Args:
        where: it is, for the message.
    Raises: UserError.
    """
    parameters = parameters_by_name(model)
    shapes = {name: (len(one.up), *one.down.shape[1:]) for name, one in adapter.factors.items()}
    shapes |= {name: tuple(offset.shape) for name, offset in adapter.offsets.items()}
    for name, shape in shapes.items():
        if name not in parameters or tuple(parameters[name].shape) != shape:
            found = f"has shape {tuple(parameters[name].shape)}" if name in parameters else "is none"
            raise UserError(
                f"{where} changes '{name}' of shape {shape}; of the model's weights there {found}. It was made for "
                "another model."
            )


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by the names that they have without PEFT's layers around them."""
    return {name: owner.get_parameter(last) for name, (owner, last) in owners_by_name(model).items()}


def owners_by_name(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The module of each parameter, and its name there, by the whole name as of :func:`parameters_by_name`."""
    return {
        f"{name}.{last}".replace(".base_layer.", ".").removeprefix("."): (module, last)
        for name, module in model.named_modules()
        for last, _ in module.named_parameters(recurse=False)
    }
