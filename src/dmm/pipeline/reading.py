"""How a merged pipeline reads prompts: by its own text encoders, or by a style's, where its teacher had others.

The current style is state of the text encoders, as it is of the denoiser, for the prompts that are read from then on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from dmm.models.adapters import Adapter
from dmm.models.adapting import Adaptation, Chosen, twin_of
from dmm.models.styles import StylePrompts
from dmm.models.text_adapters import TextOf, clips_of, fitted
from dmm.pipeline.choosing import uncompiled

_STATE = "adaptation"  # a plain attribute: what is no submodule is not saved with the model


def attach_reading(pipe: Any, prompts: StylePrompts) -> None:
    """Let the text encoders of a pipeline read in its styles; until one is set they read as they did."""
    if prompts.adapters:
        for encoder in map(uncompiled, clips_of(pipe).values()):
            vars(encoder)[_STATE] = Adaptation(of_prompts=True)


def read_in(pipe: Any, prompts: StylePrompts, style: Chosen) -> None:
    """Read prompts as styles do, until the next call.

    Args:
        style: see :func:`dmm.pipeline.styled.set_style`, which has checked it.
    Raises: UserError: see :meth:`dmm.models.adapting.Adaptation.choose`.
    """
    for component, (encoder, state) in _states(pipe).items():
        state.choose(encoder, prompts.names, TextOf(prompts.adapters, component, encoder), style)


@contextmanager
def reading_restored(pipe: Any, prompts: StylePrompts) -> Iterator[None]:
    """After the block, prompts are read as before it."""
    before = {component: state.chosen for component, (_, state) in _states(pipe).items()}
    try:
        yield
    finally:
        for component, (encoder, state) in _states(pipe).items():
            state.choose(encoder, prompts.names, TextOf(prompts.adapters, component, encoder), before[component])


def reads_otherwise(prompts: StylePrompts, style: Any) -> bool:
    """Whether prompts are read otherwise in a style, a mix or none than without one."""
    names = style if isinstance(style, Mapping) else [style]
    return any(prompts.adapters[name].text for name in names if name in prompts.adapters)


def share_reading(pipe: Any, second: Any, prompts: StylePrompts) -> None:
    """Give a second pipeline on the same weights a reading of its own, which begins as the first one's is."""
    for component, (encoder, state) in _states(pipe).items():
        state.share(encoder, prompts.names, TextOf(prompts.adapters, component, encoder))
        twin = twin_of(encoder)
        own = vars(twin)[_STATE] = Adaptation(shared=True, of_prompts=True)
        setattr(second, component, twin)
        own.choose(twin, prompts.names, TextOf(prompts.adapters, component, twin), state.chosen)


def give_stock_reading(pipe: Any, twin: Any, adapter: Adapter) -> None:
    """Give a copy of a pipeline stock text encoders that read as a style does; what that does not change is shared."""
    for component, (encoder, state) in _states(pipe).items():
        stock = twin_of(encoder)
        state.give_own_weights(stock, fitted(component, encoder, adapter))
        del vars(stock)[_STATE]
        setattr(twin, component, stock)


def _states(pipe: Any) -> dict[str, tuple[nn.Module, Adaptation]]:
    clips = {name: uncompiled(one) for name, one in clips_of(pipe).items()}
    return {name: (one, vars(one)[_STATE]) for name, one in clips.items() if _STATE in vars(one)}
