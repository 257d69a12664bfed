"""Everything that is checked of a few-step distillation before anything large is loaded, and what it is going to do."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dmm.data import CaptionedImages, ImageDataset, ImageFolder, Synthesis
from dmm.errors import UserError
from dmm.families import Family
from dmm.files.few_steps import FILE, FewSteps
from dmm.files.outputs import existing_parent
from dmm.files.prompts import read_prompts
from dmm.files.runs import ACCELERATION, CHECKPOINTS, checkpoints, step_of
from dmm.files.sizes import told_bytes
from dmm.formats.schedules import ends_in_noise, noise_schedule
from dmm.maths.consistency import steps_to_pass
from dmm.maths.diffusion import PredictionType
from dmm.maths.sharing import share_batch
from dmm.models.few_step import fast_layers, is_told, style_names_of
from dmm.models.side_car import read_side_car
from dmm.models.styles import StylePrompts
from dmm.models.teachers import CheckedModel, ModelSource, check_model, locate
from dmm.pipeline.samplers import check_multiple
from dmm.recipes.accelerating import FewStepRecipe
from dmm.training.costs import Sizes, checkpoint_bytes, disk_bytes, student_bytes, teacher_bytes
from dmm.training.machine import check_precision, check_space, check_trackers
from dmm.training.outlook import count, every, kept, told_device
from dmm.training.picture_sizes import own_size

_POINTS = 50
"""Of the teacher's path, where the recipe does not say; LCM's."""


@dataclass(frozen=True)
class FewStepPlan:
    """A few-step distillation that was found fit to run.

    Attributes:
        model: what is accelerated, where its weights are.
        folder: of it; its file, where it is one.
        style_prompts: None of a stock model.
        size: of the pictures, in pixels a side.
        alphas_cumprod: (T,), its noise schedule.
        skip: timesteps between two points of its path.
        sizes: how many weights take part; of a LoRA, its own are what ``head`` has.
    """

    family: Family
    model: ModelSource
    folder: Path
    style_prompts: StylePrompts | None
    size: int
    prediction_type: PredictionType
    alphas_cumprod: Tensor
    skip: int
    sizes: Sizes

    def few_steps(self, recipe: FewStepRecipe) -> FewSteps:
        """What the result says that it was distilled with."""
        return FewSteps(recipe.method, recipe.guidance, self.skip, recipe.rank)


def check_acceleration(recipe: FewStepRecipe, folder: Path, num_processes: int, device: torch.device) -> FewStepPlan:
    """Check that a recipe's model is there, whole, and can be accelerated, and that this machine can do what it asks.

    Args:
        folder: of the run.
    Raises: UserError: the first thing that is wrong.
    """
    training = recipe.training
    check_precision(training.precision, device)
    check_trackers(recipe.logging.trackers)
    source = ModelSource(recipe.model)
    path = locate(source)
    checked = check_model(source, name="model")
    if checked.family.is_flow:
        raise UserError(
            f"{path} is of {checked.family.title}, a family that is trained by rectified flow, along which no few-step "
            "model is distilled here. Use a few-step LoRA that others have made for it: dmm generate --lora."
        )
    style_prompts = read_side_car(path) if path.is_dir() else None
    schedule = noise_schedule(checked.scheduler_config)
    _check_batch(training.batch_size, len(style_names_of(style_prompts)), num_processes)
    _check_path(recipe, checked, schedule)
    size = recipe.size or own_size(checked.path, checked.skeletons, checked.family)
    check_multiple("size", size, 2 ** (len(checked.skeletons["vae"].config.block_out_channels) - 1))
    plan = FewStepPlan(
        checked.family,
        replace(source, model=path),
        path,
        style_prompts,
        size,
        checked.prediction_type,
        schedule,
        recipe.skip or max(1, len(schedule) // _POINTS),
        _sizes(recipe, checked),
    )
    open_data(recipe, plan)
    averaged = training.ema_decay is not None
    check_space(folder, disk_bytes(plan.sizes, keep=recipe.checkpoint.keep, averaged=averaged))
    return plan


def _check_batch(batch_size: int, num_styles: int, num_processes: int) -> None:
    try:
        for process in range(num_processes):
            share_batch(batch_size, [1 / num_styles] * num_styles, num_processes, process)
    except ValueError as error:
        raise UserError(
            f"training.batch_size is {batch_size}, which does not give every process a sample of each of its styles, "
            f"of {num_styles} in all. Raise it."
        ) from error


def _check_path(recipe: FewStepRecipe, checked: CheckedModel, schedule: Tensor) -> None:
    if is_told(checked.denoiser.config) or (checked.path / FILE).is_file():
        raise UserError(
            f"{checked.path} was distilled to paint in few steps already. Name the model that it was distilled from."
        )
    if recipe.skip is not None and 2 * recipe.skip > len(schedule):
        raise UserError(
            f"skip is {recipe.skip}, of a model with {len(schedule)} timesteps, whose path would have fewer than two "
            f"points; choose at most {len(schedule) // 2}."
        )
    if checked.prediction_type == "epsilon" and ends_in_noise(schedule):
        raise UserError(
            f"{checked.path} predicts epsilon on a schedule that ends in pure noise, where that says nothing of the "
            "picture: no step leads from there. Only models that predict v can be accelerated on such a schedule."
        )


def open_data(recipe: FewStepRecipe, plan: FewStepPlan) -> CaptionedImages | Synthesis:
    """What the recipe's data are made from.

    Raises: UserError: it cannot be read, or is empty.
    """
    data = recipe.data
    if data.images is not None:
        return ImageFolder(data.images)
    if data.dataset is not None:
        return ImageDataset(data.dataset)
    painted = data.synthesize
    assert painted is not None  # the recipe has one of the three
    return Synthesis(
        read_prompts(painted.prompts),
        painted.count * len(style_names_of(plan.style_prompts)),
        steps=painted.steps,
        guidance_scale=painted.guidance,
        seed=painted.seed,
    )


def describe_acceleration(
    recipe: FewStepRecipe, plan: FewStepPlan, folder: Path, *, device: torch.device, num_processes: int
) -> str:
    """A few-step distillation in a few lines: of what, how, how long, what it takes, and from where it goes on."""
    training, averaged = recipe.training, recipe.training.ema_decay is not None
    sizes, half = plan.sizes, training.precision != "fp32"
    least, most = recipe.guidance
    guided = f"guidance {least:g} to {most:g}, which it is told" if recipe.draws_guidance else f"guidance {least:g}"
    points = len(plan.alphas_cumprod) // plan.skip
    what = f"a LoRA of rank {recipe.rank}" if recipe.rank else "all weights"
    styles = plan.style_prompts.names if plan.style_prompts else []
    in_styles = f" in {count(len(styles), 'style')} ({', '.join(styles)})" if styles else ""
    source, place = open_data(recipe, plan), existing_parent(folder)
    num_pictures = source.count if isinstance(source, Synthesis) else len(source.captions)
    lines = {
        "method": f"{recipe.method}, {what}; {points} points of the teacher's path, {guided}",
        "training": f"{count(training.steps, 'step')} of {count(training.batch_size, 'sample')}; learning rate "
        f"{training.learning_rate:g}",
        "data": f"{count(num_pictures, 'picture')} of {plan.size} x {plan.size} pixels",
        "checkpoints": f"{every(recipe.checkpoint.every)} and at the end, of "
        f"{told_bytes(checkpoint_bytes(sizes, averaged=averaged))} each; {kept(recipe.checkpoint.keep)}",
        "memory": f"{told_bytes(student_bytes(sizes, averaged=averaged))} for what is trained, "
        f"{told_bytes(teacher_bytes(sizes, num_teachers=1, half=half))} for the teacher, and what "
        f"{min(training.micro_batch_size, training.batch_size)} samples at a time take",
        "disk": f"{told_bytes(disk_bytes(sizes, keep=recipe.checkpoint.keep, averaged=averaged))} of "
        f"{told_bytes(shutil.disk_usage(place).free)} that are free at {place}",
    }
    passed = steps_to_pass(points, training.ema_decay)
    if training.steps < passed:
        lines["too short"] = (
            f"what is learnt at the path's end reaches its beginning in about {passed:,.0f} steps; raise "
            "training.steps or skip, or lower training.ema_decay"
        )
    saved = checkpoints(folder / ACCELERATION / CHECKPOINTS)
    if saved:
        lines["goes on"] = f"from step {step_of(saved[-1]):,} of {training.steps:,}"
    processes = "" if num_processes == 1 else f" in {num_processes} processes"
    head = f"{recipe.model} accelerated{in_styles}{processes} on {told_device(device)}, in {training.precision}."
    return "\n".join([head, *(f"  {f'{name}:':<13}{told}" for name, told in lines.items())])


def _sizes(recipe: FewStepRecipe, checked: CheckedModel) -> Sizes:
    denoiser, *readers = (checked.skeletons[one.name] for one in checked.family.present(checked.skeletons))
    weights = _num_weights(denoiser)
    if not recipe.rank:
        return Sizes(denoiser=weights, style_prompts=0, readers=sum(map(_num_weights, readers)))
    shapes = [denoiser.get_parameter(name).shape for name in fast_layers(denoiser)]
    trained = sum(min(recipe.rank, len(one), one[1:].numel()) * (len(one) + one[1:].numel()) for one in shapes)
    # what is frozen is the teacher, and nothing else is written
    return Sizes(denoiser=0, style_prompts=0, readers=0, backbone=weights, head=trained)


def _num_weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
