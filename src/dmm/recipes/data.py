"""What a student is trained on."""

from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from dmm.recipes.controls import Made
from dmm.recipes.parts import Count, File, Folder, Number, Part, Seed, Whole, in_range, path_or_id


class Synthesize(Part):
    """Pictures that the teachers paint themselves."""

    prompts: File
    """A text file, one prompt a line."""
    count: Count = 1500
    """Pictures by each teacher."""
    steps: Annotated[Whole, in_range(least=1, most=1000)] = 25
    """Of the sampler, DPM-Solver++."""
    guidance: Annotated[Number, in_range(least=1)] = 7.0
    """Classifier-free guidance scale; 1 is none."""
    seed: Seed = 0
    """Of the starting noise."""
    own: Annotated[Number, in_range(least=0, most=1)] = 0.0
    """The share of each style's samples that its own teacher painted; the others are any teacher's. 1 is DMM §3.4's
    fine-tuning."""
    student: Annotated[Number, in_range(least=0, most=1)] = 0.0
    """The share of each style's samples that the student painted in it, as it starts: where its own mistakes lead, and
    what the teacher makes of it (as in DAgger, arXiv:1011.0686). For a start that has the styles."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.own + self.student > 1 + 1e-9:
            raise ValueError(f"own {self.own:g} and student {self.student:g} are shares of one whole; lower one")
        return self


class Data(Part):
    """What the student is trained on: one of three."""

    images: Folder | None = None
    """A captioned folder: ``1.txt`` beside ``1.png``, kohya's ``10_concept/``, or ``metadata.jsonl``."""
    dataset: Annotated[str, AfterValidator(path_or_id)] | None = None
    """A ``datasets`` dataset: a hub id, or a path."""
    synthesize: Synthesize | None = None
    """None but what the teachers paint; of ControlNets, what the base does."""
    conditions: dict[str, str | Made] | None = None
    """Of ControlNets: by control, what it is shown of a picture. A text names the key of ``metadata.jsonl`` whose value
    is the file of the condition image; ``{make: edges}`` has it made of the picture."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        fields = ["images", "dataset", "synthesize"]
        found = [name for name in fields if getattr(self, name) is not None]
        if len(found) != 1:
            raise ValueError(f"found {' and '.join(found) or 'nothing'}, expected one of {', '.join(fields)}")
        return self
