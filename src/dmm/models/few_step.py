"""The student of few-step distillation: a model in its styles, told its guidance, or with a fast LoRA beside it.

What stock models of LCM have, one more linear layer beside the timestep's frequencies, tells the student guidance. It
starts at zero, so that the student starts as its teacher.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmm.families import Family, arguments
from dmm.models.adapters import NOTHING, Adapter, Factors, mix_adapters
from dmm.models.calibration import layers_of
from dmm.models.student import TrainedAdapter
from dmm.models.styles import StylePrompts, attach_styles, styled_port
from dmm.models.unfused import changes_of, set_changes

TOLD_DIM = 256
"""Of sines and cosines; LCM's."""
MODEL = "model"
"""Stands for the one style of a model that has none."""


class FewStepStudent(nn.Module):
    """A model that is trained, or frozen and its own teacher, in every style that it has.

    Styles are what they were: prompts and adapters are neither trained nor submodules.

    Args:
        denoiser: a stock one, on the CPU; styles are attached to it.
        style_prompts: None of a model without styles.
        fast: a LoRA to train in place of the denoiser's weights, which then are frozen, and no submodule.
    """

    def __init__(
        self, denoiser: Any, style_prompts: StylePrompts | None, family: Family, *, fast: Adapter | None = None
    ) -> None:
        super().__init__()
        self._terms: Tensor | None = None
        self._adapters: list[Adapter] = []
        if style_prompts is not None:
            attach_styles(denoiser, style_prompts, family.port)
            names = style_prompts.names
            if style_prompts.config.dim:
                with torch.no_grad():  # one by one, as they are set: products of several rows round otherwise
                    self._terms = torch.stack([style_prompts(one) for one in torch.eye(len(names))])
            if style_prompts.adapters:
                self._adapters = [style_prompts.adapters.get(name, NOTHING) for name in names]
        if fast is None:
            self.unet = denoiser.requires_grad_()
        else:
            # __setattr__ would register it as a submodule: saved with every checkpoint, and sent to every process
            self.__dict__["unet"] = denoiser.eval().requires_grad_(False)
        self.fast = None if fast is None else TrainedAdapter(fast)

    def parameter_groups(self, rate: float, _style_rate: float) -> list[tuple[nn.Module, float]]:
        """What is trained, and how fast."""
        return [(self.unet if self.fast is None else self.fast, rate)]

    def forward(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        style_weights: Tensor,
        told: Tensor | None = None,
        *,
        with_fast: bool = True,
    ) -> Tensor:
        """Predict with a style for each sample.

        Args:
            x_t: (B, C, H, W); or (2 B, C, H, W) of guidance, as are timesteps and conditioning.
            timesteps: (B,).
            conditioning: what the denoiser reads, by flat names.
            style_weights: (B, N), one-hot.
            told: (B, :data:`TOLD_DIM`), by the layer for it; None is nothing.
            with_fast: whether the LoRA, where there is one, takes part.
        Returns: (B, C, H, W), of its prediction type.
        """
        styles = style_weights.argmax(1)
        condition = {} if told is None else {"timestep_cond": told.to(x_t.dtype)}
        call = partial(self.unet, x_t, timesteps, **arguments(conditioning, x_t.dtype), **condition, return_dict=False)
        port = styled_port(self.unet)
        if port is not None and self._terms is not None:
            port.term = self._terms.to(x_t.device)[styles]
        try:
            return self._adapted(call, styles, with_fast=with_fast)
        finally:
            if port is not None:
                port.term = None

    @property
    def has_adapters(self) -> bool:
        """Whether its styles do: batches of one style only are then less work."""
        return bool(self._adapters)

    def _adapted(self, call: partial[tuple[Tensor]], styles: Tensor, *, with_fast: bool) -> Tensor:
        """Call the denoiser with what the samples' styles and the LoRA change of its layers."""
        weight = next(self.unet.parameters())
        adapters = self._adapters = [one.to(weight.device) for one in self._adapters]
        one_style = bool((styles == styles[0]).all())
        if one_style:
            adapters = adapters[int(styles[0]) :][:1]
        # what is computed again for a backward pass would find other weights by then
        if self.fast is None and one_style and adapters and not self.unet.is_gradient_checkpointing:
            set_changes(self.unet, {})
            output: Tensor = functional_call(self.unet, _changed(self.unet, adapters[0]), call.args, call.keywords)[0]
            return output
        if self.fast is not None and with_fast:
            fast = self.fast.adapter()
            adapters = [mix_adapters([(1.0, one), (1.0, fast)]) for one in adapters] or [fast]
        if self._adapters or self.fast is not None:
            changes = changes_of(adapters, styles if len(adapters) > 1 else None) if adapters else {}
            set_changes(self.unet, changes)  # until the next call
        return call()[0]


def _changed(denoiser: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The weights that an adapter changes, changed, by name; gradients flow to the denoiser's own."""
    parameters, changed = dict(denoiser.named_parameters()), {}
    for name, one in adapter.factors.items():
        weight = parameters[name]
        up, down = one.up.to(weight.dtype), one.down.to(weight.dtype).flatten(1)
        changed[name] = torch.addmm(weight.flatten(1), up, down).reshape(weight.shape)
    for name, offset in adapter.offsets.items():
        changed[name] = parameters[name] + offset.to(parameters[name].dtype)
    return changed


def fast_layers(denoiser: nn.Module) -> list[str]:
    """The weights that a fast LoRA changes: every linear layer and convolution of the blocks, as LCM-LoRA has them.

    What embeds time, where styles are put, and the first and last layer are not among them.
    """
    return [name for name in layers_of(denoiser) if "block" in name.partition(".")[0]]


def new_fast(denoiser: nn.Module, rank: int, seed: int) -> Adapter:
    """A LoRA that changes nothing yet: ``up`` is zero, ``down`` random, as everywhere.

    Args:
        rank: at most; a layer that is narrower has its own width.
        seed: of its randomness.
    """
    generator, layers = torch.Generator().manual_seed(seed), layers_of(denoiser)
    factors = {}
    for name in fast_layers(denoiser):
        weight: Tensor = layers[name].weight  # type: ignore[assignment]
        fitting = min(rank, len(weight), weight[0].numel())
        down = torch.empty(fitting, *weight.shape[1:])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        factors[name] = Factors(torch.zeros(len(weight), fitting), down)
    return Adapter(factors, {})


def add_told(denoiser: Any, family: Family) -> None:
    """Give a denoiser the layer by which it is told its guidance; it changes nothing yet."""
    embedding = _embedding(denoiser, family)
    embedding.cond_proj = nn.Linear(TOLD_DIM, embedding.linear_1.in_features, bias=False)
    nn.init.zeros_(embedding.cond_proj.weight)
    denoiser.register_to_config(time_cond_proj_dim=TOLD_DIM)


def is_told(config: Mapping[str, Any]) -> bool:
    """Whether a denoiser of this config is told its guidance."""
    return config.get("time_cond_proj_dim") is not None


def style_names_of(style_prompts: StylePrompts | None) -> Sequence[str]:
    """The styles of a model; of one without, a name that stands for itself."""
    return [MODEL] if style_prompts is None else style_prompts.names


def _embedding(denoiser: Any, family: Family) -> Any:
    """What embeds time."""
    return denoiser.get_submodule(family.port.rpartition(".")[0])
