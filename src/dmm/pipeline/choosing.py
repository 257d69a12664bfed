"""Choosing what a model says, of all that it can: a style of a denoiser, a control of a ControlNet.

Both are state of the model, at the layer that embeds time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from dmm.errors import UserError
from dmm.maths.mixes import Mix
from dmm.models.adapting import Chosen
from dmm.models.styles import StyledLinear, StylePrompts, style_weights, styled_port
from dmm.pipeline.style_schedule import StyleSchedule


@torch.no_grad()
def choose(model: Any, style: Chosen) -> None:
    """Let a model that has styles say one, until the next call.

    Args:
        style: see :func:`dmm.pipeline.styled.set_style`.
    Raises: UserError: there is none of that name, weights do not sum to 1, the list is empty, or it is something else.
    """
    port = styled_port(model)
    assert port is not None
    prompts = port.style_prompts
    port.guided = bool  # whoever knows what runs says so afterwards: see dmm.pipeline.styled.set_style
    if style is None:
        adapt(model, None)
        port.term = None
        return
    if isinstance(style, StyleSchedule):
        raise UserError("A style over time changes while a run goes on: paint within dmm.style_over_time(pipe, style).")
    if isinstance(style, str | Mapping) or not isinstance(style, Sequence):
        term = style_term_of(prompts, style)
    elif style:
        term = torch.stack([style_term_of(prompts, one) for one in style])
    else:
        raise UserError("A list of styles needs one style for each image; this one is empty.")
    adapt(model, style)
    # on the device of the style prompts, not of the model: weights that are offloaded may be on none
    port.term = term.to(port.weight.dtype) if prompts.config.dim else None


@contextmanager
def temporarily(model: Any, style: Chosen) -> Iterator[None]:
    """:func:`choose` for the length of a block; what was chosen before is chosen again after it."""
    port = styled_port(model)
    assert port is not None
    before, adapted, guided = port.term, port.adaptation.chosen, port.guided
    choose(model, style)
    try:
        yield
    finally:
        port.term, port.guided = before, guided
        adapt(model, adapted)


def adapt(model: Any, chosen: Chosen) -> None:
    """Put the adapters of a choice on a model, where its styles have any."""
    port = styled_port(model)
    assert isinstance(port, StyledLinear)
    port.adaptation.choose(uncompiled(model), port.style_prompts.names, port.style_prompts.adapters, chosen)


def style_term_of(prompts: StylePrompts, style: Mix | None) -> Tensor:
    """The style term in float32, whatever the dtype of the prompts; (D,)."""
    if style is None:  # an image without a style among others with one: adding 0 is skipping
        return prompts.embeddings.new_zeros(prompts.config.dim, dtype=torch.float32)
    parameters = {name: parameter.float() for name, parameter in prompts.named_parameters()}
    weights = style_weights(prompts.names, style).to(prompts.embeddings.device)
    term: Tensor = functional_call(prompts, parameters, weights)
    return term


def uncompiled(model: Any) -> Any:
    """The model within what ``torch.compile`` made of it."""
    return getattr(model, "_orig_mod", model)
