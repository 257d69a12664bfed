"""All that a merge will take, of its recipe and what was found of its models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmm.data import CaptionedImages, Synthesis
from dmm.maths.sharing import share_batch
from dmm.planning.cards import CARDS, MEASURED_CORE, Card, seconds_per_sample
from dmm.planning.memory import Activations, Parts, Place, micro_batch, phases, take_turns
from dmm.planning.step import Shapes
from dmm.recipes.recipe import Recipe
from dmm.training.costs import Sizes
from dmm.training.machine import shares_of
from dmm.training.merge_costs import disk_parts, trained
from dmm.training.samples import NUM_PROMPTS
from dmm.training.watch import SAMPLES_PER_STYLE

STORED = 2
"""Bytes of a number in the cache, float16."""
NUM_CURVE_POINTS = 5  # of a style's calibration, about


@dataclass(frozen=True)
class Estimate:
    """What a merge takes.

    Attributes:
        memory: of a process where it computes, bytes by phase and part.
        in_turn: its teachers' weights wait in the CPU's memory.
        disk: bytes by part; the cache is the user's, and serves other runs too.
        samples: of training, by stage; and the pictures that it learns on.
        flops: by part.
        num_operations: of a sample of training, that a device is given.
        step_flops: of a sample of training.
    """

    memory: Mapping[str, Parts]
    in_turn: bool
    disk: Parts
    samples: Parts
    flops: Mapping[str, float]
    num_operations: float
    step_flops: float

    @property
    def phase(self) -> str:
        """That takes the most memory."""
        return max(self.memory, key=lambda phase: sum(self.memory[phase].values()))

    @property
    def num_bytes(self) -> int:
        """Of memory, at most."""
        return sum(self.memory[self.phase].values())

    def seconds_on(self, card: Card) -> tuple[float, str]:
        """How long the merge takes on one card, and how that is known."""
        of_step, how = seconds_per_sample(card, self.step_flops, self.num_operations)
        trained_seconds = self.samples["training"] * of_step
        # what else there is passes at the rate of training, as far as arithmetic is what bounds it
        rest = sum(flops for part, flops in self.flops.items() if part != "training")
        other, _ = seconds_per_sample(card, rest, 0)
        return trained_seconds + other, how

    def seconds_on_core(self) -> float:
        """How long it takes on one core of a CPU."""
        return sum(self.flops.values()) / MEASURED_CORE.flops_per_second


def estimate(
    recipe: Recipe,
    sizes: Sizes,
    activations: Activations,
    source: CaptionedImages | Synthesis | None,
    styles: Sequence[str],
    *,
    on_gpu: bool,
    num_bytes: float | None = None,
    num_processes: int = 1,
) -> Estimate:
    """What a merge of one stage takes.

    Args:
        activations: of its models.
        source: of its data; None where they are not counted.
        styles: the student's.
        on_gpu, num_bytes: see :class:`dmm.planning.memory.Place`.
    """
    place = Place(on_gpu, num_served(recipe, num_processes), num_bytes)
    at_once = micro_batch(recipe.training, num_processes)
    memory = phases(recipe, sizes, activations, place, at_once)
    num_samples = samples_of(recipe)
    num_pictures = num_pictures_of(source)
    flops = _other_flops(recipe, activations, source, num_pictures, at_once)
    step_flops = num_operations = 0.0
    if trained(sizes, recipe):
        step = activations.of_step(recipe, at_once)
        flops["training"] = num_samples * step.flops
        if recipe.logging.score_error_every:
            times = recipe.training.steps // recipe.logging.score_error_every + 1
            flops["watching"] = times * SAMPLES_PER_STYLE * len(styles) * activations.of_painting(recipe).flops
        if recipe.sample_interval:
            guided = 2 if recipe.logging.sample_guidance > 1 else 1
            evaluations = _num_samples_shown(recipe, len(styles)) * recipe.logging.sample_steps * guided
            flops["samples"] = evaluations * activations.of_painting(recipe).flops
        step_flops, num_operations = step.flops, step.num_operations / at_once
    cache = _cache(recipe, activations.shapes, source, num_pictures)
    return Estimate(
        memory=memory,
        in_turn=take_turns(recipe, sizes, place),
        disk={"cache": cache, **{name: size for name, size in disk_parts(sizes, recipe).items() if size}},
        samples={"training": num_samples, "pictures": num_pictures},
        flops=flops,
        num_operations=num_operations,
        step_flops=step_flops,
    )


def num_served(recipe: Recipe, num_processes: int) -> int:
    """How many teachers a process serves."""
    batch_size, shares = recipe.training.batch_size, shares_of(recipe)
    if recipe.styles.trained != "all":  # by themselves: they share no batch, however many they are
        batch_size, shares = num_processes * len(shares), [1 / len(shares)] * len(shares)
    return len(share_batch(batch_size, shares, num_processes, 0))


def num_pictures_of(source: CaptionedImages | Synthesis | None) -> int:
    """How many pictures a merge learns on; 0 where they are not counted."""
    if source is None:
        return 0
    return source.count if isinstance(source, Synthesis) else len(source.captions)


def samples_of(recipe: Recipe) -> int:
    """Of training; where styles are trained by themselves, of all of them."""
    training, trains = recipe.training, recipe.styles.trained
    if trains == "none":
        return 0
    if trains == "all":
        return training.steps * training.batch_size
    return sum(max(1, round(training.steps * one.weight)) for one in recipe.teachers) * training.batch_size


def _other_flops(
    recipe: Recipe,
    activations: Activations,
    source: CaptionedImages | Synthesis | None,
    num_pictures: int,
    at_once: int,
) -> dict[str, float]:
    encoding, _ = activations.of_vae
    if isinstance(source, Synthesis):
        guided = 2 if source.guidance_scale > 1 else 1
        flops = {"painting": num_pictures * source.steps * guided * activations.of_painting(recipe).flops}
    else:
        flops = {"encoding": num_pictures * encoding.flops}
    if recipe.styles.has_adapters:
        count = len(recipe.teachers) * recipe.styles.samples
        looking = activations.of_calibration(recipe, min(at_once, recipe.styles.samples)).flops
        flops["calibration"] = count * (looking + NUM_CURVE_POINTS * activations.of_painting(recipe).flops)
    return flops


def _num_samples_shown(recipe: Recipe, num_styles: int) -> int:
    """Pictures in the grids of samples: by the student as often as it is shown, and once by its teachers."""
    assert recipe.sample_interval
    num_grids = math.ceil(recipe.training.steps / recipe.sample_interval)
    num_prompts = len(recipe.logging.sample_prompts) or NUM_PROMPTS
    return (num_grids + 1) * num_styles * num_prompts


def _cache(recipe: Recipe, shapes: Shapes, source: CaptionedImages | Synthesis | None, num_pictures: int) -> int:
    """Latents, and the captions as the base and every teacher reads them, at most: equal text encoders share theirs."""
    if source is None:
        return 0
    captions = set(source.prompts if isinstance(source, Synthesis) else source.captions)
    text = sum(one.numel() for one in shapes.conditioning(1).values())
    of_texts = (1 + len(recipe.teachers)) * (1 + len(captions)) * text
    return STORED * (num_pictures * shapes.latents(1).numel() + of_texts)


def as_json(found: Estimate, *, num_processes: int = 1) -> dict[str, Any]:
    """What ``dmm plan --json`` prints: bytes, samples, FLOPs and hours."""
    hours = {}
    for card in CARDS:
        seconds, how = found.seconds_on(card)
        hours[card.name] = {"hours": seconds / 3600 / num_processes, "known": how}
    core = {
        "hours": found.seconds_on_core() / 3600 / num_processes,
        "known": f"scaled by arithmetic from {MEASURED_CORE.where}",
    }
    hours["CPU core"] = core
    phases = {phase: dict(parts) for phase, parts in found.memory.items()}
    return {
        "memory": {"total": found.num_bytes, "phase": found.phase, "phases": phases, "in_turn": found.in_turn},
        "disk": {"total": sum(found.disk.values()), "parts": dict(found.disk)},
        "samples": dict(found.samples),
        "flops": {"total": math.fsum(found.flops.values()), "parts": dict(found.flops)},
        "hours": hours,
    }
