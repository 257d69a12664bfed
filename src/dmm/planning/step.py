"""What a merge computes, run without numbers: what activations take, and how much arithmetic it is.

Of a training step it is :func:`dmm.training.distill.distill` itself that runs, on the meta device, so that what it
keeps is what is counted.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dmm.families import Family, ask
from dmm.families.conditioning import Frame
from dmm.maths.processes import VariancePreserving
from dmm.models.adapters import Adapter, Factors
from dmm.models.calibration import Noised, Observer, layers_of, observe
from dmm.models.discriminator import Discriminator
from dmm.models.student import AdaptedStudent, StyledStudent
from dmm.models.styles import StylePrompts
from dmm.models.teachers import freeze
from dmm.planning.tracing import Imitated, Meter, checkpointing
from dmm.recipes.recipe import Recipe
from dmm.training.building import DTYPES
from dmm.training.distill import Adversary, Batch, Part, Rediffusion, Teacher, distill

META = torch.device("meta")


@dataclass(frozen=True)
class Shapes:
    """The models of a merge, on the meta device, and what they are given.

    Attributes:
        family: of all of them.
        skeletons: the base's components by name.
        size: of the pictures, pixels a side.
    """

    family: Family
    skeletons: Mapping[str, Any]
    size: int

    @property
    def denoiser(self) -> Any:
        """The base's."""
        return self.skeletons[self.family.denoiser.name]

    def latents(self, num_samples: int) -> Tensor:
        """(B, C, H, W), float32."""
        vae = self.skeletons["vae"].config
        side = self.size // 2 ** (len(vae.block_out_channels) - 1)
        return torch.empty(num_samples, vae.latent_channels, side, side, device=META)

    def conditioning(self, num_samples: int) -> dict[str, Tensor]:
        """What the denoiser reads, by flat names, as the base's text encoders give it."""
        tokens = {}
        for reader in self.family.present(self.skeletons):
            if not reader.tokenizer:
                continue
            length = reader.num_tokens or self.skeletons[reader.name].config.max_position_embeddings
            tokens[reader.tokenizer] = torch.zeros(num_samples, length, dtype=torch.int64, device=META)
            if reader.template:
                tokens[f"{reader.tokenizer}_mask"] = torch.ones(num_samples, length, dtype=torch.int64, device=META)
        told = self.family.read_size(Frame.whole(self.size, self.size))
        sizes = {name: value.to(META).expand(num_samples, *value.shape) for name, value in told.items()}
        with torch.no_grad():
            return self.family.read_tokens(SimpleNamespace(**self.skeletons), tokens, None) | sizes


@dataclass(frozen=True)
class Traced:
    """What a run of one batch takes.

    Attributes:
        num_bytes: the most that is alive at a time beside what was there before.
        flops: of a sample.
        num_operations: of the whole batch.
    """

    num_bytes: int
    flops: float
    num_operations: int


def trace_step(recipe: Recipe, shapes: Shapes, *, rank: int, num_styles: int, num_samples: int, on_gpu: bool) -> Traced:
    """Run a micro-batch forward and backward, beside gradients of an earlier one.

    Args:
        recipe: its precision, losses and gradient checkpointing; and what is trained.
        rank: of the adapters, where styles have some.
        num_styles: that the student has at a time.
        num_samples: of the micro-batch.
    """
    half = half_of(recipe)
    with META:
        student, teacher, adversary = _build(recipe, shapes, rank, num_styles)
        batch = _batch(shapes, num_samples, num_styles, with_adversary=adversary is not None)
    if recipe.training.gradient_checkpointing:
        again = checkpointing(half, on_gpu=on_gpu)
        student.unet.enable_gradient_checkpointing(again)
        if adversary is not None:
            adversary.discriminator.backbone.enable_gradient_checkpointing(again)
    student.train()
    for parameter in student.parameters():
        parameter.grad = torch.empty_like(parameter)
    weight = recipe.losses.feature
    with Meter() as meter, Imitated(half, on_gpu=on_gpu):
        loss = distill(student, {0: teacher}, batch, feature_weight=weight, adversary=adversary).loss
        torch.autograd.backward([loss])  # Tensor.backward would leave the imitation
    return _traced(meter, num_samples)


def trace_calibration(recipe: Recipe, shapes: Shapes, *, num_samples: int, on_gpu: bool) -> Traced:
    """Run a frozen teacher forward and backward, as it is calibrated, and each layer's observer beside it.

    The covariances and differences that observers hold were there before, and are not among what is told.
    """
    with META:
        batch = _batch(shapes, num_samples, 1, with_adversary=False)
        teacher = freeze(copy.deepcopy(shapes.denoiser))
        layers: list[Any] = list(layers_of(teacher).values())
        observers = [Observer(layer, torch.empty_like(layer.weight, dtype=torch.float32)) for layer in layers]
    with Meter() as meter, Imitated(half_of(recipe), on_gpu=on_gpu):
        observe(teacher, observers, [Noised(batch.x_t, batch.timesteps, batch.conditioning)], seed=0)
    return _traced(meter, num_samples)


@torch.no_grad()
def trace_forward(recipe: Recipe, shapes: Shapes, *, num_samples: int, on_gpu: bool) -> Traced:
    """Ask a teacher, in its own precision."""
    dtype = DTYPES[recipe.training.precision]
    with META:
        batch = _batch(shapes, num_samples, 1, with_adversary=False)
        teacher = freeze(copy.deepcopy(shapes.denoiser).to(dtype))
    with Meter() as meter, Imitated(None, on_gpu=on_gpu):
        ask(teacher, batch.x_t, batch.timesteps, batch.conditioning, dtype)
    return _traced(meter, num_samples)


@torch.no_grad()
def trace_vae(shapes: Shapes, *, num_pictures: int) -> tuple[Traced, Traced]:
    """Encode some pictures, and decode one, in float32."""
    vae = shapes.skeletons["vae"]
    with Meter() as encoding, Imitated(None, on_gpu=False):
        vae.encode(torch.empty(num_pictures, 3, shapes.size, shapes.size, device=META))
    with Meter() as decoding, Imitated(None, on_gpu=False):
        vae.decode(shapes.latents(1))
    return _traced(encoding, num_pictures), _traced(decoding, 1)


def half_of(recipe: Recipe) -> torch.dtype | None:
    """The precision of autocast; None where there is none."""
    dtype = DTYPES[recipe.training.precision]
    return None if dtype == torch.float32 else dtype


def _traced(meter: Meter, num_samples: int) -> Traced:
    return Traced(meter.peak, meter.flops / num_samples, meter.num_operations)


def _build(
    recipe: Recipe, shapes: Shapes, rank: int, num_styles: int
) -> tuple[StyledStudent | AdaptedStudent, Teacher, Adversary | None]:
    dtype = DTYPES[recipe.training.precision]
    names = [f"style {index}" for index in range(num_styles)]
    denoiser, beside = copy.deepcopy(shapes.denoiser), copy.deepcopy(shapes.denoiser)
    student: StyledStudent | AdaptedStudent
    if recipe.styles.has_adapters:
        adapter = some_adapter(denoiser, rank)
        shared = recipe.styles.trained == "all"
        denoiser = denoiser if shared else denoiser.to(dtype)
        student = AdaptedStudent(denoiser, dict.fromkeys(names, adapter), train_shared=shared)
    else:
        student = StyledStudent(denoiser, StylePrompts(names, shapes.family.width(denoiser)), shapes.family)
    adversary = None
    if recipe.losses.adversarial:
        discriminator = Discriminator(shapes.denoiser, num_styles, dtype=dtype)
        adversary = Adversary(discriminator, recipe.losses.adversarial, "epsilon")
    return student, Teacher(freeze(beside.to(dtype)), "epsilon", "epsilon"), adversary


def some_adapter(model: nn.Module, rank: int) -> Adapter:
    """An adapter of one rank in every layer, as far as a layer has it, and of every other parameter."""
    layers = layers_of(model)
    factors, offsets = {}, {}
    for name, parameter in model.named_parameters():
        if name not in layers:
            offsets[name] = torch.empty(parameter.shape, device=META)
            continue
        outputs, inputs = parameter.shape[0], parameter[0].numel()
        least = min(rank, outputs, inputs)
        up, down = torch.empty(outputs, least, device=META), torch.empty(least, *parameter.shape[1:], device=META)
        factors[name] = Factors(up, down)
    return Adapter(factors, offsets)


def _batch(shapes: Shapes, num_samples: int, num_styles: int, *, with_adversary: bool) -> Batch:
    x_t, each = shapes.latents(num_samples), torch.empty(num_samples)
    timesteps, conditioning = torch.zeros(num_samples, dtype=torch.int64), shapes.conditioning(num_samples)
    return Batch(
        x_t=x_t,
        timesteps=timesteps,
        levels=each,
        process=VariancePreserving(each),
        style_weights=torch.empty(num_samples, num_styles),
        conditioning=conditioning,
        loss_weights=each,
        score_weights=each,
        parts=[Part(0, slice(0, num_samples), conditioning)],
        again=Rediffusion(timesteps, each, torch.empty_like(x_t)) if with_adversary else None,
    )
