"""The factors of a LoRA that keep what moves a model's output most, by what its layers meet on pictures of its own.

The formulae are those of :mod:`dmm.maths.low_rank`; ranks are dealt over the layers from as many parameters as a LoRA
of one rank everywhere has.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.data import Synthesis, prepare_data
from dmm.errors import UserError
from dmm.families import denoiser_of, family_of
from dmm.files.prompts import read_prompts
from dmm.formats.schedules import process_of
from dmm.maths.low_rank import Components, deal_ranks
from dmm.maths.sharing import Group
from dmm.models.calibration import Noised, calibrated_components
from dmm.models.devices import find_device
from dmm.models.teachers import ModelSource, freeze, open_pipeline
from dmm.soup.recipe import Calibration, SoupRecipe
from dmm.training.batches import Batches, Role
from dmm.training.calibrating import budget_of_rank, costs_of, shapes_of

CAPTION_DROPOUT = 0.1
"""As in training: guidance asks a model without a caption, too."""
_MICRO_BATCH = 8
# of a layer's components, how many times the rank asked for are kept to be dealt from, and how many at least
_KEPT, _LEAST_KEPT = 8, 64


def calibrated_layers(recipe: SoupRecipe) -> dict[str, tuple[Components, Sequence[int]]]:
    """The components of a teacher's difference from the base that are kept, by the name of the denoiser's weight, and
    the weight's shape.

    Args:
        recipe: of the method ``extract``, with a ``calibration`` and a ``rank``.
    Raises: UserError: the prompts or a model cannot be read, or the size does not suit them.
    """
    calibration, rank = recipe.calibration, recipe.rank
    assert calibration is not None  # the recipe saw to both
    assert rank is not None
    (named,) = recipe.teachers
    prompts, device, base_path = read_prompts(calibration.prompts), find_device(), str(recipe.base)
    path, label = named.model or base_path, f"teacher '{named.name}'"
    loras = tuple((lora.path, lora.scale) for lora in named.all_loras)
    ema = named.ema if named.model else recipe.ema
    base = open_pipeline(ModelSource(base_path, config=_configs(recipe, base_path), ema=recipe.ema), name="base")
    source = ModelSource(path, config=_configs(recipe, path), loras=loras, ema=ema)
    pipeline = open_pipeline(source, name=label).to(device)
    teacher, start = freeze(denoiser_of(pipeline)), freeze(denoiser_of(base))
    theirs, ours = (dict(model.named_parameters()) for model in (teacher, start))

    def difference(name: str) -> Tensor:
        return (theirs[name] - ours[name].to(device)).detach()

    def batches() -> Iterator[Noised]:
        for batch in samples.of_step(0):
            yield Noised(batch.x_t, batch.timesteps, batch.parts[0].conditioning)

    samples = _samples(calibration, named.name, prompts, pipeline, device)
    gains, components = {}, {}
    for name, found in calibrated_components(teacher, difference, batches, seed=calibration.seed):
        gains[name], components[name] = found.gains, found.cut(max(_LEAST_KEPT, _KEPT * rank))
    (ranks,) = deal_ranks([gains], costs_of(start), budget_of_rank(start, rank))
    shapes = shapes_of(start)
    return {name: (components[name].cut(count), shapes[name]) for name, count in ranks.items()}


def _configs(recipe: SoupRecipe, model: str) -> Path | None:
    return recipe.config if Path(model).is_file() else None


def _samples(calibration: Calibration, name: str, prompts: list[str], pipeline: Any, device: torch.device) -> Batches:
    """Noised pictures that the teacher has painted."""
    size = calibration.size or _own_size(name, pipeline)
    synthesis = Synthesis(
        prompts,
        calibration.count,
        steps=calibration.steps,
        guidance_scale=calibration.guidance,
        seed=calibration.seed,
    )
    return Batches(
        prepare_data(synthesis, pipeline, {name: lambda: pipeline}, size=size),
        [name],
        [Role([0], name, 1.0)],
        groups=[Group(0, range(calibration.samples), 1 / calibration.samples)],
        process=process_of(pipeline.scheduler.config, family_of(pipeline)),
        caption_dropout=CAPTION_DROPOUT,
        micro_batch_size=_MICRO_BATCH,
        seed=calibration.seed,
        device=device,
    )


def _own_size(name: str, pipeline: Any) -> int:
    own = family_of(pipeline).sample_size_of(denoiser_of(pipeline).config)
    if not own:
        raise UserError(
            f"teacher '{name}' does not say of what size its pictures are; say it as calibration.size, such as 512."
        )
    side: int = own if isinstance(own, int) else min(own)
    return side * int(pipeline.vae_scale_factor)
