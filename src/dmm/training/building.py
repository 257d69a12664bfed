"""What a merge trains and learns from, built of its plan: the student, the teachers, the adversary."""

import copy
from types import MappingProxyType
from typing import Any

import torch

from dmm.data.training import STUDENT, reader_in
from dmm.families import denoiser_of
from dmm.maths.sharing import Group
from dmm.models.discriminator import Discriminator
from dmm.models.student import StyledStudent, grow
from dmm.models.styles import StylePrompts
from dmm.models.teachers import freeze, open_pipeline
from dmm.recipes.recipe import Recipe
from dmm.training.batches import Role
from dmm.training.distill import Adversary, EarlierStudent, Teacher, Teachers
from dmm.training.machine import shares_of
from dmm.training.merge_costs import student_bytes
from dmm.training.merge_plan import Plan
from dmm.training.reading import Text
from dmm.training.residency import place_teachers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By the recipe's words."""


def build_student(recipe: Recipe, plan: Plan, base: Any, *, average: bool) -> StyledStudent:
    """The student at its start, float32, on the CPU.

    Args:
        average: whether this process averages the teachers, where that is the start; the others' weights are made
            equal to its when training begins.
    """
    denoiser = shared_weights(recipe, plan, base, average=average)
    prompts = plan.style_prompts
    if prompts is None and plan.earlier is not None:
        prompts = grow(plan.earlier, [teacher.name for teacher in recipe.teachers])
    elif prompts is None:
        prompts = StylePrompts(list(plan.styles), plan.family.width(denoiser))
    return StyledStudent(denoiser, prompts, plan.family)


def shared_weights(recipe: Recipe, plan: Plan, base: Any, *, average: bool = True) -> Any:
    """The model that a student begins with, float32, on the CPU.

    Args:
        average: see :func:`build_student`.
    """
    denoiser = plan.subject.of(base).to("cpu")  # the watch has asked it where the run computes
    if plan.start is not None:
        denoiser = plan.subject.open(plan.start, name="start")[0]
    elif recipe.start == "average" and average:
        mean = {name: torch.zeros_like(tensor) for name, tensor in denoiser.state_dict().items()}
        for source in plan.teachers:
            for name, tensor in plan.subject.open(source)[0].state_dict().items():
                mean[name] += tensor
        denoiser.load_state_dict({name: tensor / len(plan.teachers) for name, tensor in mean.items()})
    return denoiser.to(memory_format=torch.channels_last)  # in which convolutions are faster, on the CPU too


def roles_of(recipe: Recipe, plan: Plan, styles: list[str], text: Text = MappingProxyType({})) -> list[Role]:
    """The teachers' roles, in the recipe's order; last comes the earlier student's, where there is one to be kept.

    Args:
        text: what styles change of the student's text encoder.
    """
    num_earlier = len(styles) - len(recipe.teachers)
    shares = shares_of(recipe)
    roles = [
        role_of(recipe, plan, i, text, style=num_earlier + i, share=share)
        for i, (_, share) in enumerate(zip(recipe.teachers, shares, strict=False))
    ]
    kept = [Role(range(num_earlier), STUDENT, share) for share in shares[len(roles) :]]
    return roles + kept


def role_of(recipe: Recipe, plan: Plan, teacher: int, text: Text, *, style: int = 0, share: float = 1.0) -> Role:
    """The role of one of the recipe's teachers, by its index; where it is alone, its style is the only one."""
    name = recipe.teachers[teacher].name
    student = reader_in(name) if name in text else STUDENT
    return Role([style], encoder_of(recipe, name), share, num_timesteps_of(plan, teacher), student)


def num_timesteps_of(plan: Plan, teacher: int) -> int | None:
    """How many of the student's timesteps a teacher can be asked about; None for all."""
    return plan.reach[teacher].num_timesteps if teacher in plan.reach else None


def encoder_of(recipe: Recipe, teacher: str) -> str:
    """Whose text encoder a teacher reads; ControlNets have none of their own."""
    return STUDENT if recipe.kind == "controlnet" else teacher


def build_adversary(
    recipe: Recipe, plan: Plan, base: Any, device: torch.device, *, num_styles: int
) -> Adversary | None:
    """The discriminator on the base's UNet, before that becomes the student; on the device before the teachers are."""
    weight = recipe.losses.adversarial
    if weight == 0:
        return None
    dtype = DTYPES[recipe.training.precision]
    discriminator = Discriminator(denoiser_of(base), num_styles, dtype=dtype, seed=recipe.seed)
    if recipe.training.gradient_checkpointing:
        discriminator.backbone.enable_gradient_checkpointing()
    return Adversary(discriminator.to(device), weight, plan.prediction_type)


def open_teachers(recipe: Recipe, plan: Plan, groups: list[Group], device: torch.device) -> Teachers:
    """The teachers that this process serves: frozen, in the recipe's precision, where they can be used."""
    teachers: dict[int, Teacher] = {}
    for index in (group.teacher for group in groups):
        if index == len(recipe.teachers):
            teachers[index] = _open_earlier_student(plan, DTYPES[recipe.training.precision])
            continue
        teachers[index] = open_teacher(recipe, plan, index)
    return place_teachers(teachers, device, num_student_bytes=student_bytes(plan.sizes, recipe))


def open_teacher(recipe: Recipe, plan: Plan, index: int) -> Teacher:
    """One of the recipe's teachers: frozen, in its precision, on the CPU."""
    name = f"teacher '{recipe.teachers[index].name}'"
    opened, predicts = plan.subject.open(plan.teachers[index], torch_dtype=DTYPES[recipe.training.precision], name=name)
    denoiser = freeze(opened).to(memory_format=torch.channels_last)
    if recipe.training.compile:
        denoiser.compile()
    reach = plan.reach.get(index)
    schedule = None if reach is None else reach.alphas_cumprod
    return Teacher(denoiser, predicts or plan.prediction_type, plan.prediction_type, schedule)


def _open_earlier_student(plan: Plan, dtype: torch.dtype) -> EarlierStudent:
    assert plan.earlier is not None
    denoiser = denoiser_of(open_pipeline(plan.base, torch_dtype=dtype, name="the earlier merge"))
    denoiser.to(memory_format=torch.channels_last)
    student = StyledStudent(denoiser, copy.deepcopy(plan.earlier).to(dtype), plan.family)
    freeze(student)
    return EarlierStudent(student)
