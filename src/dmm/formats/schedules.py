"""Noise schedules, as a folder's scheduler config and a single file's header tell of them.

A single file has no scheduler config. By custom an empty tensor says that its UNet predicts v, and another that its
schedule was rescaled to end in pure noise; other tools know no more. Files of our own carry their scheduler config.
"""

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Family
from dmm.files.json import read_json
from dmm.formats.building import building, check_config
from dmm.formats.configs import carried_config
from dmm.formats.original_layout import V_PREDICTION_MARK, ZERO_SNR_MARK
from dmm.formats.tensors import Header
from dmm.maths.flow import Density, quantiles, shifted
from dmm.maths.processes import Process, RectifiedFlow, VariancePreserving
from dmm.maths.schedules import LEAST_SIGNAL

_FILE = "scheduler_config.json"
_PARTS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "timestep_spacing"),
)
_MAX_STEPS = 100_000
STOCK = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""What every tool takes a single file's schedule for."""


def read_scheduler_config(folder: Path, family: Family | None = None) -> dict[str, Any]:
    """Read the scheduler config of a stock folder.

    Args:
        family: of the folder's model, which tells what way of adding noise is expected; by default either.
    Raises: UserError: it is missing or broken, or of a scheduler that adds noise in another way than the family.
    """
    path = folder / "scheduler" / _FILE
    config = read_json(path)
    name = str(config.get("_class_name"))
    scheduler = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler is None:
        raise UserError(f"{path} names the scheduler '{name}', which diffusers does not have. Save the folder again.")
    if not (is_flow(config) or _takes(scheduler, "beta_start")) or (family and is_flow(config) != family.is_flow):
        way = "is not" if family is None or not family.is_flow else "is"
        raise UserError(
            f"{path} names a {name} for models that are trained in another way, "
            f"{'by noise of many steps' if way == 'is' else 'as by flow matching'}, and this one "
            f"{'is by flow matching' if way == 'is' else 'is not'}. Put the scheduler_config.json of its base model in "
            "that place."
        )
    check_config(config, path, scheduler)
    noise_schedule(config, str(path))
    with building(f"{path} describes no {name}"):
        built = scheduler.from_config(config)
        # what shifts by the picture's size is told it
        size = {"mu": 1.0} if built.config.get("use_dynamic_shifting") else {}
        # some begin with several steps of another kind, and those for few steps have no more than their path has points
        most = min(built.config.num_train_timesteps, built.config.get("original_inference_steps") or math.inf)
        built.set_timesteps(int(min(25, most)), **size)
    return config


def write_scheduler_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write the scheduler config of a stock folder; that of the folder's ``model_index.json`` is the caller's."""
    text = json.dumps({name: value for name, value in config.items() if name != "_name_or_path"}, indent=2)
    (folder / "scheduler" / _FILE).write_text(text + "\n", encoding="utf-8")


def open_scheduler(config: Mapping[str, Any]) -> Any:
    """The scheduler of a config that :func:`read_scheduler_config` has passed."""
    return getattr(diffusers, config["_class_name"]).from_config(config)


def noise_schedule(config: Mapping[str, Any], where: str = "The scheduler config") -> Tensor:
    """The signal power at every timestep, (T,), that a model's scheduler config tells of: of a flow, the line's.

    Args:
        where: the config's file, as the error's first words.
    Raises: UserError: it tells of none.
    """
    try:
        if int(config.get("num_train_timesteps", 0)) > _MAX_STEPS:
            raise ValueError(f"num_train_timesteps is more than {_MAX_STEPS}")
        if is_flow(config):  # one for all shifts: models are told sigma, whatever they are asked at most
            num_steps = int(config.get("num_train_timesteps", 1000))
            return (1 - (torch.arange(num_steps) + 1) / num_steps).square()
        alphas_cumprod: Tensor = DDPMScheduler.from_config(config).alphas_cumprod
        told = alphas_cumprod.ndim == 1 and len(alphas_cumprod) > 0 and bool(alphas_cumprod.isfinite().all())
        fault = "" if told else "not every step has a finite one"
    except (ValueError, TypeError, ArithmeticError, RuntimeError, NotImplementedError, AttributeError) as error:
        fault = str(error).split("\n", 1)[0]
    if fault:
        raise UserError(f"{where} tells of no noise schedule: {fault}. Get another copy, or the base model's.")
    return alphas_cumprod


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config is of a model that was trained by rectified flow."""
    # an open scheduler's config does not name its class
    of_its_own = str(config.get("_class_name")).startswith("FlowMatch") or (
        "shift" in config and "beta_start" not in config
    )
    return of_its_own or bool(config.get("use_flow_sigmas"))


def predicted(config: Mapping[str, Any]) -> Any:
    """What a model with this scheduler config predicts, in diffusers' words."""
    return "flow_prediction" if is_flow(config) else str(config.get("prediction_type", "epsilon"))


def process_of(
    config: Mapping[str, Any], family: Family, *, density: Density | None = None, shift: float | None = None
) -> Process:
    """How latents are noised for a model, each step drawn as often as when it was trained.

    Args:
        config: of its scheduler.
        family: the model's.
        density: of a flow's sigmas before they are shifted, by default the family's.
        shift: of a flow's sigmas, by default the scheduler's.
    """
    if not is_flow(config):
        return VariancePreserving(noise_schedule(config))
    sigmas = quantiles(int(config.get("num_train_timesteps", 1000)), density or family.density or "uniform")
    return RectifiedFlow(shifted(sigmas, shift or float(config.get("shift") or 1.0)))


def check_same_schedule(name: str, schedule: Tensor, other: str, other_schedule: Tensor) -> None:
    """Refuse a model that was trained on another noise schedule.

    Args:
        name: of the model, as the error's first words.
        schedule, other_schedule: (T,), from :func:`noise_schedule`.
        other: whose the other schedule is, as in ``the student's``.
    Raises: UserError: they differ; with the values where they differ most.
    """
    if same_schedules(schedule, other_schedule):
        return
    if len(schedule) != len(other_schedule):
        raise UserError(
            f"{name}: its noise schedule has {len(schedule)} steps, {other} {len(other_schedule)}. Choose models that "
            "were trained on one schedule."
        )
    step = int((schedule - other_schedule).abs().argmax())
    raise UserError(
        f"{name}: its noise schedule is not {other}: alphas_cumprod at step {step} is {schedule[step]:.6g}, "
        f"{other} {other_schedule[step]:.6g}. Choose models that were trained on one schedule."
    )


def same_schedules(one: Tensor, other: Tensor) -> bool:
    """Whether two noise schedules, from :func:`noise_schedule`, are one to rounding."""
    return len(one) == len(other) and torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def ends_in_noise(schedule: Tensor) -> bool:
    """Whether the last step of a noise schedule leaves nothing of the picture."""
    return bool(schedule[-1] <= LEAST_SIGNAL)


def marks(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The empty tensors by which a single file of a model with this scheduler config says what loaders look for."""
    found: list[str] = []
    if is_flow(config):
        return {}
    if config.get("prediction_type") == "v_prediction":
        found.append(V_PREDICTION_MARK)
    if ends_in_noise(noise_schedule(config)):
        found.append(ZERO_SNR_MARK)
    return {name: torch.zeros(0) for name in found}


def untold_by_marks(config: Mapping[str, Any]) -> str | None:
    """What other tools will not know of a single file with this schedule, for people; None where they know all."""
    if is_flow(config):
        return None
    schedule = noise_schedule(config)
    zero = ends_in_noise(schedule)
    assumed = noise_schedule({**STOCK, "rescale_betas_zero_snr": zero})
    if same_schedules(schedule, assumed):
        return None
    return (
        "its noise schedule is not the usual one, which a single file cannot tell other tools: they will paint "
        "otherwise unless they are given its scheduler_config.json; a folder has one"
    )


def said_of_schedule(path: Path, header: Header) -> dict[str, Any]:
    """What a single file says of its noise schedule, as changes to a scheduler config; empty where it says nothing.

    Its own word is worth more than that of the configs that it is opened with: it is a fact of the weights.

    Raises: UserError: it says it, but not so that it can be read.
    """
    carried = carried_config(path, header, f"scheduler/{_FILE}") or {}
    said = {name: carried.get(name) for name in _PARTS} if carried else {}
    if carried:
        noise_schedule(carried, f"{path}: the scheduler config that it carries")
    if ZERO_SNR_MARK in header.tensors and not said.get("rescale_betas_zero_snr"):
        # spread so that sampling begins where nothing of a picture is left: Lin et al. 2023, section 3.3
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return said


def with_schedule(config: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler config with what a model says of its schedule; of another class where its own does not know that."""
    changed = {name: value for name, value in {**config, **said}.items() if name not in said or said[name] is not None}
    scheduler = getattr(diffusers, str(changed.get("_class_name")), DDPMScheduler)
    if changed.get("rescale_betas_zero_snr") and not _takes(scheduler, "rescale_betas_zero_snr"):
        changed |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    return changed


def _takes(scheduler: Any, setting: str) -> bool:
    return setting in inspect.signature(scheduler.__init__).parameters
