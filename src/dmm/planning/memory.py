"""The memory of a merge's process at the device it computes on, by phase and part, in bytes.

Weights are counted (:mod:`dmm.training.merge_costs`), activations traced (:mod:`dmm.planning.step`). On a CPU it is
all of the process: its libraries, and the models that wait, beside what is on a GPU otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dmm.models.calibration import MAX_BYTES, layers_of, sides
from dmm.pipeline.sampling import usual_batch_size
from dmm.planning.step import Shapes, Traced, trace_calibration, trace_forward, trace_step, trace_vae
from dmm.recipes.recipe import Recipe
from dmm.recipes.training import Training
from dmm.training.costs import FULL, HALF, Sizes
from dmm.training.merge_costs import frozen_bytes, student_bytes, training_parts
from dmm.training.model_sizes import UNKNOWN_RANK
from dmm.training.residency import FOR_ACTIVATIONS

Parts = Mapping[str, int]

LIBRARIES = 550e6
"""What Python, torch and diffusers take themselves on a CPU: measured. A GPU's context takes about as much: assumed."""


@dataclass(frozen=True)
class Place:
    """Where a process computes.

    Attributes:
        on_gpu: or else on a CPU.
        num_bytes: of its memory; None where that does not matter.
        num_served: teachers of the process.
    """

    on_gpu: bool
    num_served: int
    num_bytes: float | None = None


class Activations:
    """What is traced of a merge, each once: of many micro-batches two, since the bytes grow evenly with the samples."""

    def __init__(self, shapes: Shapes, *, on_gpu: bool) -> None:
        self.shapes, self._on_gpu = shapes, on_gpu
        self._steps: dict[object, dict[int, Traced]] = {}
        self._paintings: dict[str, Traced] = {}
        self._calibrations: dict[tuple[str, int], Traced] = {}

    def of_step(self, recipe: Recipe, num_samples: int) -> Traced:
        """Of training, by a micro-batch of so many samples."""
        kind = (recipe.losses, recipe.styles, recipe.training.precision, recipe.training.gradient_checkpointing)
        known = self._steps.setdefault(kind, {})
        if num_samples in known:
            return known[num_samples]
        if len(known) > 1:
            (few, one), (many, other) = sorted(known.items())[:: len(known) - 1]
            slope = (other.num_bytes - one.num_bytes) / (many - few)
            return Traced(round(one.num_bytes + slope * (num_samples - few)), one.flops, one.num_operations)
        traced = trace_step(
            recipe,
            self.shapes,
            rank=recipe.styles.rank or UNKNOWN_RANK,
            num_styles=len(recipe.teachers) if recipe.styles.trained == "all" else 1,
            num_samples=num_samples,
            on_gpu=self._on_gpu,
        )
        known[num_samples] = traced
        return traced

    def of_calibration(self, recipe: Recipe, num_samples: int) -> Traced:
        """Of a teacher that is looked at."""
        kind = (recipe.training.precision, num_samples)
        if kind not in self._calibrations:
            traced = trace_calibration(recipe, self.shapes, num_samples=num_samples, on_gpu=self._on_gpu)
            self._calibrations[kind] = traced
        return self._calibrations[kind]

    def of_painting(self, recipe: Recipe) -> Traced:
        """Of one step of a sampler, with guidance."""
        precision = recipe.training.precision
        if precision not in self._paintings:
            count = 2 * usual_batch_size(self.shapes.size, self.shapes.size)
            self._paintings[precision] = trace_forward(recipe, self.shapes, num_samples=count, on_gpu=self._on_gpu)
        return self._paintings[precision]

    @cached_property
    def of_vae(self) -> tuple[Traced, Traced]:
        """Of encoding the pictures of a batch, and of decoding one."""
        return trace_vae(self.shapes, num_pictures=usual_batch_size(self.shapes.size, self.shapes.size))


def micro_batch(training: Training, num_processes: int) -> int:
    """Samples that a process computes at a time."""
    return min(training.micro_batch_size, -(-training.batch_size // num_processes))


def take_turns(recipe: Recipe, sizes: Sizes, place: Place) -> bool:
    """Whether a process's teachers wait in the CPU's memory: :func:`dmm.training.residency.place_teachers`."""
    if not place.on_gpu or place.num_bytes is None or recipe.styles.trained != "all":
        return False
    needed = frozen_bytes(recipe) * place.num_served * sizes.denoiser
    left = place.num_bytes - student_bytes(sizes, recipe) - FOR_ACTIVATIONS * place.num_bytes
    return needed > left - frozen_bytes(recipe) * sizes.backbone


def phases(recipe: Recipe, sizes: Sizes, activations: Activations, place: Place, num_samples: int) -> dict[str, Parts]:
    """Each phase's parts.

    Args:
        num_samples: of a micro-batch.
    """
    found = {"encoding": _encoding(recipe, sizes, activations, place)}
    if recipe.styles.has_adapters:
        found["calibration"] = _calibration(recipe, sizes, activations, place, num_samples)
        if not place.on_gpu:
            found["dealing"] = _dealing(sizes)
    if recipe.styles.trained != "none":
        training = _training(recipe, sizes, activations, place, num_samples)
        found["training"] = training
        if recipe.sample_interval:
            found["samples"] = _samples(recipe, sizes, activations, training)
    return {phase: {"libraries": round(LIBRARIES)} | _some(parts) for phase, parts in found.items()}


def _training(recipe: Recipe, sizes: Sizes, activations: Activations, place: Place, num_samples: int) -> Parts:
    served = place.num_served if recipe.styles.trained == "all" else 1
    resident = min(2, served) if take_turns(recipe, sizes, place) else served
    parts = dict(training_parts(sizes, recipe, num_teachers=resident))
    parts["activations"] = activations.of_step(recipe, num_samples).num_bytes
    if not place.on_gpu:
        parts["waiting"] = FULL * sizes.readers
        if recipe.styles.has_adapters:  # the base, and each style as it starts, as it is kept
            apart = recipe.styles.trained == "adapters"
            parts["waiting"] += apart * FULL * sizes.denoiser + (FULL + HALF) * sizes.num_styles * sizes.adapter
            parts["waiting"] += HALF * sizes.num_styles * sizes.text_adapter
    return parts


def _samples(recipe: Recipe, sizes: Sizes, activations: Activations, training: Parts) -> Parts:
    """While the student paints its samples: no gradients and no activations of a step, but the readers."""
    left = {name: size for name, size in training.items() if name not in ("gradients", "activations", "waiting")}
    painting, (_, decoding) = activations.of_painting(recipe), activations.of_vae
    at_once = max(painting.num_bytes, decoding.num_bytes)
    return {**left, "readers": max(FULL * sizes.readers, training.get("waiting", 0)), "activations": at_once}


def _encoding(recipe: Recipe, sizes: Sizes, activations: Activations, place: Place) -> Parts:
    parts = {"readers": FULL * sizes.readers, "activations": activations.of_vae[0].num_bytes}
    if not place.on_gpu:
        parts["waiting"] = FULL * sizes.denoiser
    if recipe.data.synthesize is not None:
        parts["teachers"] = frozen_bytes(recipe) * sizes.pipeline
        parts["activations"] = activations.of_painting(recipe).num_bytes
    elif not place.on_gpu:
        parts["teachers"] = FULL * sizes.pipeline
    else:
        parts["teachers"] = FULL * sizes.readers
    return parts


def _calibration(recipe: Recipe, sizes: Sizes, activations: Activations, place: Place, num_samples: int) -> Parts:
    covariances = 0
    for rows, columns in map(sides, layers_of(activations.shapes.denoiser).values()):
        covariances += 4 * (2 * min(rows, columns) ** 2 + rows * columns)
    count = min(num_samples, recipe.styles.samples)
    parts = {
        "shared weights": FULL * sizes.denoiser,
        "teachers": FULL * sizes.denoiser,
        "covariances": min(MAX_BYTES, covariances),
        "activations": activations.of_calibration(recipe, count).num_bytes,
    }
    if not place.on_gpu:
        parts |= {"waiting": FULL * sizes.readers + FULL * sizes.readers, "calibration": FULL * sizes.calibrated}
    return parts


def _dealing(sizes: Sizes) -> Parts:
    return {
        "waiting": FULL * sizes.pipeline,
        "calibration": FULL * sizes.num_styles * sizes.calibrated,
        "styles": sizes.num_styles * (FULL * sizes.adapter + HALF * sizes.text_adapter),
    }


def _some(parts: Parts) -> dict[str, int]:
    return {name: int(size) for name, size in parts.items() if size}
