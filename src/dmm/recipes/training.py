"""How a student is trained; what is kept and told of that."""

from typing import Annotated, Any, Literal, Self

from pydantic import StrictBool, model_validator

from dmm.recipes.parts import AUTO, Count, Interval, Number, Part, Whole, in_range

ADAPTER_DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {
        "steps": 1000,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-4,
        "lr_schedule": "cosine",
    },
    "losses": {"adversarial": 0.0},
    "finetune.training": {
        "steps": 300,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 5e-5,
        "lr_schedule": "cosine",
    },
}
"""What a recipe does not say where styles are adapters; steps are of each style. Eight models of 860 M parameters take
a night with it on a card of 24 GB: docs/merge.md has the sum, which no such card has confirmed."""


class Timesteps(Part):
    """How often a model of rectified flow is trained at which sigma; by default as its family is."""

    density: Literal["logit_normal", "uniform"] | None = None
    """Of sigmas, before they are shifted."""
    shift: Annotated[Number, in_range(above=0)] | None = None
    """Towards noise, above 1; by default what the base's scheduler says."""


class Training(Part):
    """How the student is trained, with AdamW; the paper's defaults, but :data:`ADAPTER_DEFAULTS` for adapters."""

    steps: Count = 100_000
    batch_size: Count = 320
    """Samples of a step, over all processes."""
    micro_batch_size: Count = 20
    """How many samples, at most, a process computes at a time; gradients are accumulated over the rest."""
    learning_rate: Annotated[Number, in_range(above=0, most=1)] = 1e-5
    style_learning_rate: Annotated[Number, in_range(above=0, most=1)] | None = None
    """Of the style prompts and their MLP, or the adapters, beside shared weights; by default ``learning_rate``."""
    lr_schedule: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """As diffusers names them."""
    warmup_steps: Annotated[Whole, in_range(least=0)] = 0
    weight_decay: Annotated[Number, in_range(least=0, most=1)] = 0.01
    """The paper does not say; AdamW's own default."""
    max_grad_norm: Annotated[Number, in_range(above=0)] | None = 1.0
    """Gradients are scaled down to this norm; null: never. The paper does not say; diffusers' scripts clip at 1."""
    caption_dropout: Annotated[Number, in_range(least=0, most=1)] = 0.1
    """The share of samples whose caption is dropped, for classifier-free guidance."""
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    """Of the computation; the student's weights are float32."""
    gradient_checkpointing: StrictBool = False
    """Compute activations twice rather than keep them: slower, in much less memory."""
    compile: StrictBool = False
    """``torch.compile`` the models."""
    ema_decay: Annotated[Number, in_range(above=0, below=1)] | None = None
    """Of an exponential moving average of the student, which is then the result; by default there is none."""
    timesteps: Timesteps | None = None
    """Of bases of rectified flow."""

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps and self.lr_schedule == "constant":
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but the lr_schedule 'constant' has no warm-up; choose "
                "'constant_with_warmup' or leave warmup_steps out"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected fewer than the {self.steps} steps")
        return self


class Losses(Part):
    """Weights of the terms that are added to score distillation."""

    noise_weighting: Annotated[Number, in_range(least=0, most=1)] = 0.0
    """p: a score weighs the signal's power at its timestep to the power of -p, so that noisy ones weigh more. 0 is the
    paper's loss; 1 compares predictions of noise as velocities. For students that predict noise."""
    feature: Annotated[Number, in_range(least=0)] = 0.001
    """Feature imitation, over the sum of the blocks' means."""
    adversarial: Annotated[Number, in_range(least=0)] = 0.01
    """The multi-class adversarial loss; at 0 there is no discriminator."""
    prediction: Annotated[Number, in_range(least=0)] = 0.0
    """Of ControlNets: what the base's UNet predicts with a control's residuals, beside the residuals themselves, which
    weigh 1; both relative to their size."""


class Checkpoint(Part):
    """What is kept to go on from."""

    every: Count = 2500
    """Steps."""
    keep: Count = 3
    """How many of the newest."""


class Logging(Part):
    """What a run tells of itself."""

    every: Count = 50
    """Steps between two entries of the loss curves."""
    trackers: tuple[
        Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"],
        ...,
    ] = ()
    """Where else the curves go, as accelerate names them."""
    score_error_every: Count | None = 500
    """Steps between two measurements of the relative score error; null: none."""
    sample_every: Interval | None = AUTO
    """Steps between two grids of samples; auto: four in a run, and one every 2500 steps at least; null: none."""
    sample_prompts: tuple[str, ...] = ()
    """What the samples show; by default the first captions of the data."""
    sample_steps: Annotated[Whole, in_range(least=1, most=1000)] = 25
    sample_guidance: Annotated[Number, in_range(least=1)] = 7.0
