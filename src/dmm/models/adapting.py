"""How the adapters of a style, a mix, or a style an image are on a pipeline's model at the moment."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from dmm.maths.mixes import Mix, mix_weights
from dmm.models.adapters import NOTHING, Adapter, KeptWeights, add_change, check_adapter, mix_adapters, owners_by_name
from dmm.models.unfused import Prompts, changes_of, set_changes

Module = TypeVar("Module", bound=nn.Module)

Chosen = Mix | Sequence[Mix | None] | None
"""As :func:`dmm.pipeline.styled.set_style` takes them."""


class Adaptation:
    """State of a model beside its weights, as its style term is.

    One style or mix for all images is fused, so that it costs nothing while it paints. A list of them runs unfused, and
    so does everything on a model that shares its weights with others.

    Attributes:
        chosen: what is on the model now.
        shared: whether others paint with the same weights.
    """

    def __init__(self, *, shared: bool = False, of_prompts: bool = False) -> None:
        """Of a model that reads prompts, or of one that paints images."""
        self.chosen: Chosen = None
        self.shared = shared
        self._prompts = Prompts() if of_prompts else None
        self._kept = KeptWeights()

    def choose(self, model: nn.Module, names: Sequence[str], adapters: Mapping[str, Adapter], chosen: Chosen) -> None:
        """Put what the styles change on a model, in place of what is on it.

        Args:
            model: whose state this is.
            names: of all styles.
            adapters: of those that have one.
        Raises: UserError: an adapter's file is damaged, or of another model; or the weights are on no device.
        """
        if not adapters or chosen == self.chosen:
            return
        one_for_all = chosen is None or isinstance(chosen, str | Mapping)
        mixes: Any = [chosen] if one_for_all else chosen
        distinct = [one for i, one in enumerate(mixes) if one not in mixes[:i]]
        made = [mixed_adapter(names, adapters, one) for one in distinct]
        for one in made:
            check_adapter(model, one, "The style's adapter")
        fused = one_for_all and not self.shared
        self._kept.fuse(model, made[0] if fused else NOTHING)
        if fused or chosen is None:
            set_changes(model, {})
        else:
            weight = next(model.parameters())
            made = [one.to(weight.device, weight.dtype) for one in made]
            index = None if one_for_all else torch.tensor([distinct.index(one) for one in mixes])
            set_changes(model, changes_of(made, index, prompts=self._prompts))
        self.chosen = chosen

    def share(self, model: nn.Module, names: Sequence[str], adapters: Mapping[str, Adapter]) -> None:
        """From now on others paint with the same weights, too."""
        chosen = self.chosen
        self.choose(model, names, adapters, None)
        self.shared = True
        self.choose(model, names, adapters, chosen)

    @torch.no_grad()
    def give_own_weights(self, twin: nn.Module, adapter: Adapter) -> None:
        """Give a twin of the model weights of its own wherever a style has another than the model has now.

        Args:
            twin: of :func:`twin_of`.
            adapter: of the style; :data:`NOTHING` of none.
        """
        set_changes(twin, {})
        shared = self._kept.of(twin)
        for name, (module, last) in owners_by_name(twin).items():
            if name in adapter.factors or name in adapter.offsets:
                own = torch.empty_like(shared[name], device=module.get_parameter(last).device)
                add_change(own, shared[name], adapter, name)
            elif shared[name] is not module.get_parameter(last):
                own = shared[name].to(module.get_parameter(last).device, copy=True)
            else:
                continue
            module._parameters[last] = nn.Parameter(own, requires_grad=module.get_parameter(last).requires_grad)


def mixed_adapter(names: Sequence[str], adapters: Mapping[str, Adapter], style: Mix | None) -> Adapter:
    """What a style, a mix or none changes.

    Raises: UserError: there is no style of that name, or weights do not sum to 1.
    """
    if style is None:
        return NOTHING
    weights = zip(names, mix_weights(names, style), strict=True)
    return mix_adapters([(weight, adapters[name]) for name, weight in weights if weight and name in adapters])


def twin_of(model: Module) -> Module:
    """A model whose modules are its own, and whose weights are the other's."""
    twin = copy.copy(model)
    for kind, value in vars(model).items():
        # what a module keeps of its parts and hooks; copy.copy leaves both with one of each
        if isinstance(value, dict) and kind != "_modules":
            vars(twin)[kind] = copy.copy(value)
    vars(twin)["_modules"] = {name: None if one is None else twin_of(one) for name, one in model._modules.items()}
    return twin
