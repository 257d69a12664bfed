"""What a merge knows of its styles before any training: their calibrated components, and what bytes come to what error.

Each teacher is looked at by itself, on some samples of the run's own data, and what comes of it is kept in the run's
folder, a file a style, so that a run goes on and processes share the work::

    merged/calibration/NAME.safetensors
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmm.families import ask
from dmm.files.outputs import new_file
from dmm.formats.tensors import read_header, read_tensors, write_tensors
from dmm.maths.low_rank import Components, deal_ranks
from dmm.models.adapters import NOTHING, Adapter, Factors, KeptWeights
from dmm.models.calibration import Noised, calibrated_components, layers_of
from dmm.recipes.styles import Styles

CURVE = (1, 2, 4, 8, 16, 32, 64, 128)
"""Ranks of uniform adapters of as many bytes, at which a style's error is measured."""
GOOD_ENOUGH = 0.01
"""The error at which a curve ends."""
# of what a curve is measured on: positions of latents, and samples, in each of which all are of one timestep
_MEASURED_POSITIONS, _LEAST_MEASURED = 2**14, 16

# of a layer's components, how many times the rank asked for are kept to be dealt from, and how many at least
_KEPT, _LEAST_KEPT = 8, 64


@dataclass(frozen=True)
class Sample(Noised):
    """B noised samples, as a teacher and as the student reads them.

    Attributes:
        student_timesteps: (B,), where those are the student's.
        student_conditioning: what the student's model reads, by flat names.
    """

    student_timesteps: Tensor
    student_conditioning: Mapping[str, Tensor]

    def as_student(self) -> Noised:
        """As the student reads them."""
        return Noised(self.x_t, self.student_timesteps, self.student_conditioning)


@dataclass(frozen=True)
class Calibrated:
    """What is known of a style.

    Attributes:
        gains: of each layer's components, all of them.
        components: the first of each layer, no fewer than can be dealt to it.
        offsets: whole differences of the parameters that are no layers' weights.
        curve: parameters of its adapter, without the offsets, and the measured error relative to the start's; the
            smallest first.
        own: the factors that its teacher has itself, where that is a LoRA on the start.
    """

    gains: Mapping[str, Tensor]
    components: Mapping[str, Components]
    offsets: Mapping[str, Tensor]
    curve: Sequence[tuple[int, float]]
    own: Mapping[str, Factors]

    def adapter(self, ranks: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> Adapter:
        """The adapter of so many components of each layer.

        Args:
            ranks: by layer's weight; those without one are not changed.
            shapes: of the weights.
        """
        factors = {}
        for name, rank in ranks.items():
            part = self.components[name].cut(rank)
            factors[name] = Factors(part.up, part.down.reshape(len(part.down), *shapes[name][1:]))
        return Adapter(factors, self.offsets)

    def own_adapter(self) -> Adapter:
        """The adapter of the teacher's own factors."""
        return Adapter(self.own, self.offsets)


def calibrate(
    teacher: nn.Module,
    start: nn.Module,
    samples: Callable[[], Iterable[Sample]],
    *,
    seed: int,
    max_rank: int,
    own: Mapping[str, Factors],
) -> Calibrated:
    """Look at a teacher.

    Args:
        teacher, start: frozen, of one architecture, on one device; both predict the same.
        samples: the same ones each time.
        seed: of the directions of the output that are followed backward.
        max_rank: of what is kept of a layer.
        own: the factors of a teacher that is a LoRA on the start.
    """
    theirs, ours = (dict(model.named_parameters()) for model in (teacher, start))

    def difference(name: str) -> Tensor:
        return (theirs[name].float() - ours[name].float()).detach()

    gains, components = {}, {}
    for name, found in calibrated_components(teacher, difference, samples, seed=seed):
        gains[name], components[name] = found.gains, found.cut(max_rank)
    layers = layers_of(start)
    offsets = {name: difference(name).cpu() for name in ours if name not in layers}
    offsets = {name: offset for name, offset in offsets.items() if offset.any()}
    calibrated = Calibrated(gains, components, offsets, (), own)
    return replace(calibrated, curve=_measure_curve(calibrated, teacher, start, _enough(samples())))


def _enough(samples: Iterable[Sample]) -> Iterator[Sample]:
    """As many of the first ones as an error is measured on: of large latents a few tell as much as many small ones."""
    num_samples = num_positions = 0
    for one in samples:
        yield one
        num_samples += len(one.x_t)
        num_positions += one.x_t[:, 0].numel()
        if num_samples >= _LEAST_MEASURED and num_positions >= _MEASURED_POSITIONS:
            return


@torch.no_grad()
def _measure_curve(
    found: Calibrated, teacher: nn.Module, start: nn.Module, samples: Iterable[Sample]
) -> list[tuple[int, float]]:
    """The error of adapters of several sizes, each dealt for this style alone."""
    asked = [(one, _say(teacher, one), _say(start, one.as_student())) for one in samples]
    whole = sum(float((of_start - of_teacher).double().square().sum()) for _, of_teacher, of_start in asked)
    costs, shapes = costs_of(start), shapes_of(start)
    kept, curve = KeptWeights(), []
    for rank in CURVE if whole else ():
        (ranks,) = deal_ranks([found.gains], costs, budget_of_rank(start, rank))
        ranks = {name: min(count, len(found.components[name].gains)) for name, count in ranks.items()}
        kept.fuse(start, found.adapter(ranks, shapes))
        left = sum(
            float((_say(start, one.as_student()) - of_teacher).double().square().sum()) for one, of_teacher, _ in asked
        )
        curve.append((sum(costs[name] * count for name, count in ranks.items()), left / whole))
        if left <= GOOD_ENOUGH * whole or ranks == {name: len(one.gains) for name, one in found.components.items()}:
            break
    kept.fuse(start, NOTHING)
    return curve


def _say(model: nn.Module, sample: Noised) -> Tensor:
    return ask(model, sample.x_t, sample.timesteps, sample.conditioning).float()


def num_kept(styles: Styles) -> int:
    """How many components of a layer are kept to be dealt from."""
    return max(_LEAST_KEPT, _KEPT * (styles.rank or _LEAST_KEPT))


def shapes_of(model: nn.Module) -> dict[str, Sequence[int]]:
    """The shapes of the weights that take low-rank changes, by name."""
    return {name: tuple(model.get_parameter(name).shape) for name in layers_of(model)}


def costs_of(model: nn.Module) -> dict[str, int]:
    """The parameters that one rank of each such weight takes."""
    return {name: shape[0] + _inputs(shape) for name, shape in shapes_of(model).items()}


def budget_of_rank(model: nn.Module, rank: int) -> int:
    """The parameters of an adapter of one rank in every layer, as far as a layer has it."""
    return sum(min(rank, shape[0], _inputs(shape)) * (shape[0] + _inputs(shape)) for shape in shapes_of(model).values())


def _inputs(shape: Sequence[int]) -> int:
    return torch.Size(shape[1:]).numel()


def deal_by_budget(
    styles: Sequence[Calibrated], costs: Mapping[str, int], budget: int
) -> list[Mapping[str, int] | None]:
    """The ranks of every style's layers, from one pot.

    Args:
        budget: parameters of a style, on average.
    Returns: by style; None of those whose own factors fit and are taken as they are.
    """
    own = [sum(one.up.numel() + one.down.numel() for one in style.own.values()) for style in styles]
    exact = [0 < size <= budget for size in own]
    pot = budget * len(styles) - sum(size for size, fits in zip(own, exact, strict=True) if fits)
    dealt = iter(deal_ranks([style.gains for style, fits in zip(styles, exact, strict=True) if not fits], costs, pot))
    return [None if fits else _kept(style, next(dealt)) for style, fits in zip(styles, exact, strict=True)]


def deal_by_error(style: Calibrated, costs: Mapping[str, int], error: float) -> Mapping[str, int] | None:
    """The ranks of a style's layers at which its error comes to about so much; it does not hang on other styles.

    Returns: None where its own factors are taken as they are.
    """
    if style.own:
        return None
    points = [(0, 1.0), *style.curve]
    for (few, above), (many, below) in itertools.pairwise(points):
        if below <= error:
            # the logarithm of the error falls about evenly with the size
            steps = (torch.tensor([above, error, below]).clamp(min=1e-6).log()).tolist()
            share = (steps[0] - steps[1]) / max(steps[0] - steps[2], 1e-12)
            return _kept(style, deal_ranks([style.gains], costs, round(few + (many - few) * share))[0])
    return _kept(style, {name: len(gains) for name, gains in style.gains.items()})


def _kept(style: Calibrated, ranks: Mapping[str, int]) -> dict[str, int]:
    return {name: min(rank, len(style.components[name].gains)) for name, rank in ranks.items()}


def write_calibrated(found: Calibrated, path: Path) -> None:
    """Write a style's calibration, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, gains in found.gains.items():
        part = found.components[name]
        tensors |= {f"gains/{name}": gains, f"up/{name}": part.up.contiguous(), f"down/{name}": part.down.contiguous()}
    tensors |= {f"offset/{name}": offset.contiguous() for name, offset in found.offsets.items()}
    for name, one in found.own.items():
        tensors |= {f"own_up/{name}": one.up.contiguous(), f"own_down/{name}": one.down.contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, overwrite=True) as temporary:
        write_tensors(temporary, tensors, {"curve": json.dumps(list(found.curve))})


def read_calibrated(path: Path) -> Calibrated:
    """Read what :func:`write_calibrated` wrote."""
    by_kind: dict[str, dict[str, Tensor]] = {
        kind: {} for kind in ("gains", "up", "down", "offset", "own_up", "own_down")
    }
    for key, tensor in read_tensors(path).items():
        kind, _, name = key.partition("/")
        by_kind[kind][name] = tensor
    components = {
        name: Components(gains[: len(by_kind["down"][name])], by_kind["up"][name], by_kind["down"][name])
        for name, gains in by_kind["gains"].items()
    }
    curve: Any = json.loads(read_header(path).metadata["curve"])
    own = {name: Factors(up, by_kind["own_down"][name]) for name, up in by_kind["own_up"].items()}
    return Calibrated(by_kind["gains"], components, by_kind["offset"], [(n, e) for n, e in curve], own)
