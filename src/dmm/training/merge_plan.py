"""A merge that was found fit to run: what is known of it before anything large is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dmm.families import Family, Frame
from dmm.maths.diffusion import PredictionType
from dmm.models.styles import Provenance, StylePrompts
from dmm.models.teachers import ModelSource
from dmm.training.costs import Sizes
from dmm.training.subject import Denoisers, Subject


@dataclass(frozen=True)
class Reach:
    """What a teacher of another noise schedule can be asked about.

    Attributes:
        alphas_cumprod: (T,), its own schedule.
        num_timesteps: of the student's, how many from the first on.
    """

    alphas_cumprod: Tensor
    num_timesteps: int


@dataclass(frozen=True)
class Plan:
    """A merge that was found fit to run.

    Attributes:
        family: of all its models.
        base: gives the student its VAE and text encoder; a merged model, where that is merged further.
        teachers: where their weights are.
        start: the model that the student begins as; None for the base, or for the teachers' average.
        earlier: the style prompts of the merged model that is merged further.
        style_prompts: those of the start, where it is a merged model of all the styles.
        size: of the pictures, in pixels a side.
        frame: what the models are told of that.
        prediction_type: of the base, and so of the student.
        styles: the student's.
        provenance: of each style.
        sizes: how many weights take part.
        subject: what of these models is merged.
        reach: by index, of the teachers whose noise schedule is not the student's.
    """

    family: Family
    base: ModelSource
    teachers: tuple[ModelSource, ...]
    start: ModelSource | None
    earlier: StylePrompts | None
    style_prompts: StylePrompts | None
    size: int
    frame: Frame
    prediction_type: PredictionType
    styles: tuple[str, ...]
    provenance: tuple[Provenance, ...]
    sizes: Sizes
    subject: Subject = field(default_factory=Denoisers)
    reach: Mapping[int, Reach] = field(default_factory=dict)
