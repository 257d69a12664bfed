"""The recipe of a few-step distillation: of what model, by what method, on what data.

Defaults are those of DMM §A.3 for DMM-SPLAM, of eight GPUs, and of SPLAM's code where that is silent; but the method
is LCM's, of which pictures have been measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, field_validator, model_validator

from dmm.recipes.data import Data
from dmm.recipes.finetune import FinetuneSynthesize
from dmm.recipes.parts import Count, Model, Number, Part, Seed, Whole, in_range, read_recipe, write_recipe
from dmm.recipes.picture_sizes import check_size
from dmm.recipes.training import Checkpoint, Training

LORA_TRAINING = {"learning_rate": 1e-4, "ema_decay": None}
"""The defaults where a LoRA is trained: those of LCM-LoRA (arXiv:2311.05556), whose target is the student as it is."""


class FewStepData(Data):
    """What the student is trained on: one of three."""

    synthesize: FinetuneSynthesize | None = None
    """None but what the model itself paints, in each of its styles."""

    @model_validator(mode="after")
    def _check_student(self) -> Self:
        if self.synthesize is not None and self.synthesize.student:
            raise ValueError("synthesize.student is for merges: here the model that paints is the student's start")
        return self


class FewStepTraining(Training):
    """How the student is trained, with AdamW."""

    steps: Count = 6000
    batch_size: Count = 400
    learning_rate: Annotated[Number, in_range(above=0, most=1)] = 8e-6
    caption_dropout: Annotated[Number, in_range(least=0, most=1)] = 0.0
    """Few-step models are painted with without guidance, which is what dropped captions are for."""
    ema_decay: Annotated[Number, in_range(above=0, below=1)] | None = 0.95
    """Of the average that is the student's target, and the result; null: the student as it is is both."""

    @model_validator(mode="after")
    def _check_styles_rest(self) -> Self:
        if self.style_learning_rate is not None:
            raise ValueError("there is a style_learning_rate, but a merge's styles are not trained here; leave it out")
        return self


class FewStepLogging(Part):
    """What a run tells of itself."""

    every: Count = 50
    """Steps between two entries of the loss curves."""
    trackers: tuple[
        Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"],
        ...,
    ] = ()
    """Where else the curves go, as accelerate names them."""


def _range(value: Any) -> Any:
    """One number, or two, as two."""
    pair = value if isinstance(value, list | tuple) else [value, value]
    if len(pair) != 2 or not all(type(one) in (int, float) and 1 <= one < 100 for one in pair) or pair[0] > pair[1]:
        raise ValueError(
            f"found {value}, expected a number of at least 1, which is no guidance, or two, as [3, 12], to draw it from"
        )
    return tuple(map(float, pair))


class FewStepRecipe(Part):
    """A few-step distillation."""

    model: Model
    """What is accelerated, set by the command: a merged model or any other, a folder, a single file or a hub id."""
    method: Literal["lcm", "splam"] = "lcm"
    """``lcm`` has the student begin at points of the teacher's path; ``splam`` anywhere between two of them."""
    rank: Annotated[Whole, in_range(least=0, most=4096)] = 0
    """Of a LoRA that is trained on frozen weights, for all styles; at 0 all weights are."""
    guidance: Annotated[tuple[float, float], BeforeValidator(_range)] = (7.0, 7.0)
    """That the teacher is guided with, and the student learns; of two numbers, what it is drawn between and told."""
    skip: Annotated[Whole, in_range(least=1)] | None = None
    """Timesteps between two points of the teacher's path; by default a fiftieth of all."""
    data: FewStepData
    size: Annotated[Whole, in_range(least=8)] | None = None
    """Of the pictures, in pixels a side, a multiple of 8; by default the model's own."""
    training: FewStepTraining = FewStepTraining()
    checkpoint: Checkpoint = Checkpoint(every=500)
    logging: FewStepLogging = FewStepLogging()
    seed: Seed = 0
    """Of everything random in training."""

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: int | None) -> int | None:
        return check_size(size)

    @property
    def draws_guidance(self) -> bool:
        """Whether each sample's guidance is drawn, and told to the student."""
        return self.guidance[0] < self.guidance[1]

    @property
    def log_interval(self) -> int:
        """Steps between two entries of the loss curves."""
        return self.logging.every

    @property
    def sample_interval(self) -> int | None:
        """No samples are painted."""
        return None

    @property
    def watch_interval(self) -> int | None:
        """There is no score error of a few-step model: it does not predict scores."""
        return None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_for_lora(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not given.get("rank"):
            return given
        training = given.get("training", {})
        return {**given, "training": {**LORA_TRAINING, **training}} if isinstance(training, dict) else given

    @model_validator(mode="after")
    def _check_embedded(self) -> Self:
        if self.draws_guidance and self.rank:
            raise ValueError(
                "guidance is to be drawn and told to the student by a new layer, and a rank is given, for a LoRA, "
                "which has no place for one; give one number, or leave rank out"
            )
        return self


def load_few_step_recipe(path: Path, overrides: Sequence[str] = (), *, may_be_gone: bool = False) -> FewStepRecipe:
    """Read the recipe of a few-step distillation; see :func:`dmm.recipes.parts.read_recipe`.

    Raises: UserError: the first mistake, with the line or the override that makes it.
    """
    return read_recipe(FewStepRecipe, path, overrides, may_be_gone=may_be_gone)


def save_few_step_recipe(recipe: FewStepRecipe, path: Path) -> None:
    """Write a recipe with all it was resolved to; :func:`load_few_step_recipe` reads an equal one.

    Raises: UserError: the file cannot be written.
    """
    write_recipe(recipe, path)
