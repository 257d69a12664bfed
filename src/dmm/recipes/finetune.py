"""A second, short stage of a merge."""

from typing import Annotated

from dmm.recipes.data import Synthesize
from dmm.recipes.parts import Count, Number, Part, in_range
from dmm.recipes.training import Training


class FinetuneTraining(Training):
    """How the second stage trains: the paper's 10,000 steps of 10."""

    steps: Count = 10_000
    batch_size: Count = 10


class FinetuneSynthesize(Synthesize):
    """What the second stage learns on, and where its student is the first one's."""

    own: Annotated[Number, in_range(least=0, most=1)] = 1.0
    """As in the paper; lower it where ``student`` shall have a share."""


class Finetune(Part):
    """A second, short stage on what the teachers paint, each style on its own teacher's pictures (DMM §3.4)."""

    synthesize: FinetuneSynthesize
    """What they paint."""
    training: FinetuneTraining = FinetuneTraining()
