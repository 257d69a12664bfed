"""Adapters of text encoders: what a style whose teacher reads otherwise changes of how prompts are read.

They are adapters as a denoiser's are, in :attr:`dmm.models.adapters.Adapter.text`, of every CLIP text encoder of the
family. Matrices, those of token and position embeddings, too, have a low-rank change, every other parameter has its
difference in full. Parameters are named as files name them: classes have changed what they call theirs.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dmm.families import components_of, family_of
from dmm.formats.lora import in_files
from dmm.maths.low_rank import plain_components
from dmm.models.adapters import NOTHING, Adapter, Factors, KeptWeights, parameters_by_name
from dmm.models.adapting import Adaptation, twin_of

# of the largest singular value's square: what is below it is the rounding of float32
_LEAST_GAIN = 1e-12


def clips_of(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline that styles may change, by component."""
    there = {one.name for one in components_of(pipeline)}
    return {one.name: getattr(pipeline, one.name) for one in family_of(pipeline).clips if one.name in there}


@torch.no_grad()
def text_difference(teacher: Any, base: Any, rank: int) -> dict[str, Adapter] | None:
    """What makes a base's text encoders read about as a teacher's do, half precision, by component.

    The factors are the plain decomposition of the differences: on the one embedded expert that has a text encoder of
    its own, rank 16 leaves 2 % of what the denoiser would otherwise be told wrongly.

    Args:
        teacher, base: pipelines of one family.
        rank: of each change, at most.
    Returns: of those that differ alone; None where the teacher's are of another shape.
    """
    found = {}
    theirs = clips_of(teacher)
    for component, encoder in clips_of(base).items():
        ours = parameters_by_name(encoder)
        others = parameters_by_name(theirs[component])
        if {name: one.shape for name, one in ours.items()} != {name: one.shape for name, one in others.items()}:
            return None
        factors, offsets = {}, {}
        for name, weight in ours.items():
            difference = others[name].float() - weight.float()
            if not difference.any():
                continue
            if difference.ndim == 2:
                part = plain_components(difference.cpu())
                part = part.cut(min(rank, int((part.gains > _LEAST_GAIN * part.gains[0]).sum())))
                factors[in_files(component, name)] = Factors(part.up, part.down)
            else:
                offsets[in_files(component, name)] = difference.cpu()
        if factors or offsets:
            found[component] = Adapter(factors, offsets).to(torch.float16)
    return found


def fitted(component: str, encoder: nn.Module, adapter: Adapter) -> Adapter:
    """A text encoder's part of an adapter, by the names that its class has for what is changed."""
    part = adapter.text.get(component, NOTHING)
    names = {in_files(component, name): name for name in parameters_by_name(encoder)} if part is not NOTHING else {}
    return Adapter(
        {names.get(name, name): one for name, one in part.factors.items()},
        {names.get(name, name): one for name, one in part.offsets.items()},
    )


@dataclass(frozen=True)
class TextOf(Mapping[str, Adapter]):
    """What styles change of one text encoder, by style; read when it is asked for.

    Attributes:
        adapters: by style, whole ones.
    """

    adapters: Mapping[str, Adapter]
    component: str
    encoder: nn.Module

    def __getitem__(self, style: str) -> Adapter:
        return fitted(self.component, self.encoder, self.adapters[style])

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)


def reading_as(pipeline: Any, adapter: Adapter) -> Any:
    """A pipeline that reads prompts as a style does; all but its text encoders is the other's."""
    reader = copy.copy(pipeline)
    for component, encoder in clips_of(pipeline).items():
        if component in adapter.text:
            own = twin_of(encoder)
            Adaptation().give_own_weights(own, fitted(component, encoder, adapter))
            setattr(reader, component, own)
    return reader


def fuse_text(pipeline: Any, adapter: Adapter) -> None:
    """Put what a style changes of the text encoders into their weights."""
    for component, encoder in clips_of(pipeline).items():
        KeptWeights().fuse(encoder, fitted(component, encoder, adapter))
