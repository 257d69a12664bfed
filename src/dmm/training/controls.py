"""What a merge of ControlNets has of its own: its checks, and the size of what the teachers say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dmm.data.conditions import MAKERS, maker_named
from dmm.data.control_images import Condition
from dmm.data.images import ImageFolder
from dmm.errors import UserError
from dmm.families import arguments
from dmm.files.digest import sha256
from dmm.formats.folder import weight_files
from dmm.models.controlnets import check_controlnet
from dmm.models.side_car import read_side_car
from dmm.models.styles import Provenance, StylePrompts
from dmm.models.teachers import ModelSource, check_model, freeze, naming
from dmm.recipes.recipe import Recipe
from dmm.training.batches import Batches
from dmm.training.building import DTYPES
from dmm.training.costs import Sizes
from dmm.training.machine import check_machine
from dmm.training.merge_plan import Plan
from dmm.training.model_sizes import adapter_sizes
from dmm.training.picture_sizes import frame_of
from dmm.training.sources import base_of
from dmm.training.subject import Controls
from dmm.training.watch import watched_groups

_MEASURED = 0xC2B2AE35  # a factor that takes seeds far away from those that people choose, and from others of ours


def check_controls(recipe: Recipe, num_processes: int, device: torch.device) -> Plan:
    """Check that a recipe's ControlNets are there, whole, and of one kind, and that what they are shown can be made.

    Raises: UserError: the first thing that is wrong.
    """
    check_machine(recipe, num_processes, device)
    base_source = base_of(recipe)
    base = check_model(base_source, name="base")
    assert recipe.size is not None
    sources = [ModelSource(teacher.model or "") for teacher in recipe.teachers]
    skeletons = [
        check_controlnet(_folder(source), base.family, base.denoiser, name=f"teacher '{teacher.name}'")
        for teacher, source in zip(recipe.teachers, sources, strict=True)
    ]
    _check_alike(recipe, skeletons)
    conditions = _conditions(recipe)
    for name, condition in conditions.items():
        with naming(f"data.conditions.{name}"):
            _check_condition(condition, recipe)
    start, component = None, base.family.controlnet
    assert component is not None  # or the first teacher would not have passed
    if recipe.start not in ("base", "average"):
        start = ModelSource(recipe.start)
        skeleton = check_controlnet(_folder(start), base.family, base.denoiser, name="start")
        _check_alike(recipe, [skeletons[0], skeleton], "start")
        if read_side_car(_folder(start)) is not None:
            raise UserError(f"start: {recipe.start} is merged already; name a ControlNet that is not.")
    provenance = tuple(
        Provenance(
            teacher.name,
            str(source.model),
            sha256(*weight_files(_folder(source), component, allow_pickle=False)[0]),
            base.family.name,
            base.prediction_type,
        )
        for teacher, source in zip(recipe.teachers, sources, strict=True)
    )
    styles = tuple(teacher.name for teacher in recipe.teachers)
    with torch.device("meta"):
        prompts = StylePrompts(list(styles), base.family.width(skeletons[0]))
    return Plan(
        base.family,
        base_source,
        tuple(sources),
        start,
        None,
        None,
        recipe.size,
        frame_of(recipe, recipe.size, base),
        base.prediction_type,
        styles,
        provenance,
        Sizes(_num_weights(skeletons[0]), _num_weights(prompts), readers=0, **adapter_sizes(recipe, skeletons[0])),
        Controls(base.family, sources, conditions, recipe.losses.prediction),
    )


def measure_residuals(
    recipe: Recipe,
    plan: Plan,
    subject: Controls,
    base: Any,
    new_batches: Callable[..., Batches],
    accelerator: Accelerator,
) -> None:
    """Let every part of what the teachers say count alike, by its size on some samples of each control.

    Every process asks the same samples, and comes to the same sizes.
    """
    device, dtype = accelerator.device, DTYPES[recipe.training.precision]
    subject.of(base)
    if subject.residuals.denoiser is not None:
        subject.residuals.denoiser.to(device, dtype)
    groups = watched_groups([1] * len(plan.teachers), 1, 0)
    batches = new_batches(groups=groups, caption_dropout=0.0, seed=(recipe.seed + 1) * _MEASURED % 2**32)
    squares = []
    for index, source in enumerate(plan.teachers):
        net = freeze(subject.open(source)[0]).to(device)
        for batch in batches.of_step(0):
            for part in batch.parts:
                if part.teacher == index:
                    given = arguments(part.conditioning)
                    x_t, timesteps = batch.x_t[part.samples], batch.timesteps[part.samples]
                    with torch.no_grad():
                        blocks = net.blocks(x_t, timesteps, **given)
                    rest = {name: value for name, value in given.items() if name != "controlnet_cond"}
                    squares.append(subject.residuals.squares(blocks, x_t, timesteps, rest).cpu())
        del net
    subject.residuals.set_powers(squares)


def _folder(source: ModelSource) -> Path:
    return Path(source.model).expanduser()


def _conditions(recipe: Recipe) -> dict[str, Condition]:
    given = recipe.data.conditions or {}
    return {
        name: Condition(column=one) if isinstance(one, str) else Condition(make=one.make) for name, one in given.items()
    }


def _check_condition(condition: Condition, recipe: Recipe) -> None:
    if condition.column is not None:
        assert recipe.data.images is not None  # the recipe is checked
        ImageFolder(recipe.data.images).column(condition.column)
        return
    from PIL import Image

    assert condition.make is not None
    maker = maker_named(condition.make)
    if condition.make in MAKERS:  # what it needs may not be installed; others' functions may take their time
        maker(Image.new("RGB", (8, 8)))


def _check_alike(recipe: Recipe, skeletons: list[Any], name: str | None = None) -> None:
    first, *others = skeletons
    expected = {key: tuple(tensor.shape) for key, tensor in first.state_dict().items()}
    for i, other in enumerate(others, 1):
        found = {key: tuple(tensor.shape) for key, tensor in other.state_dict().items()}
        for key in [*expected, *found]:
            if expected.get(key) != found.get(key):
                told = name or f"teacher '{recipe.teachers[i].name}'"
                raise UserError(
                    f"{told}: its '{key}' has shape {found.get(key)}, that of '{recipe.teachers[0].name}' "
                    f"{expected.get(key)}. Choose ControlNets of one architecture."
                )


def _num_weights(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
