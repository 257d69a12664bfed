"""Everything that is checked of a merge before anything large is loaded."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dmm.errors import UserError
from dmm.files.digest import sha256
from dmm.files.few_steps import FILE as FEW_STEPS
from dmm.formats.schedules import check_same_schedule, noise_schedule, same_schedules
from dmm.maths.schedules import num_answerable
from dmm.models.conditioning import check_clip_skip
from dmm.models.side_car import read_side_car
from dmm.models.style_names import check_addition
from dmm.models.styles import Provenance, StylePrompts
from dmm.models.teachers import CheckedModel, ModelSource, check_model, locate, naming
from dmm.pipeline.samplers import check_multiple
from dmm.recipes.recipe import Recipe
from dmm.recipes.teacher import Teacher
from dmm.training.machine import check_machine
from dmm.training.merge_plan import Plan, Reach
from dmm.training.model_sizes import sizes_of
from dmm.training.picture_sizes import buckets_of, frame_of, own_size
from dmm.training.sources import base_of, named_base, paints_itself, teacher_source

# the share of the student's timesteps below which a teacher would leave too much untaught
_LEAST_REACH = 0.8
_ADVICE = {
    "cross_attention_dim": "Choose teachers of one family.",
    "guidance_embeds": (
        "One was distilled to read a guidance scale, the other reads none, and no student paints as both: choose "
        "teachers of one kind."
    ),
}
"""Where configs differ, what to do about it."""
# of a denoiser's config, what says nothing of what it computes
_HARMLESS = ("sample_size", "upcast_attention")


def check_merge(recipe: Recipe, num_processes: int, device: torch.device, *, with_digests: bool = True) -> Plan:
    """Check that a recipe's models are there, whole, and of one kind, and that this machine can do what it asks.

    Args:
        with_digests: read every byte of the teachers for the provenance, which else has no digests.
    Raises: UserError: the first thing that is wrong.
    """
    check_machine(recipe, num_processes, device)
    base_source = base_of(recipe)
    base = check_model(base_source, name="base")
    # what LoRAs are put on, and whose configs single files follow
    beneath = check_model(named_base(recipe), name="base") if recipe.earlier else base
    _check_noise_weighting(recipe.losses.noise_weighting, base)
    if recipe.training.timesteps is not None and not base.family.is_flow:
        raise UserError(
            f"training.timesteps is for models of rectified flow; this base is {base.family.title}, whose steps "
            "are drawn alike. Leave it out."
        )
    size = recipe.size or own_size(base.path, base.skeletons, base.family)
    step = 2 ** (len(base.skeletons["vae"].config.block_out_channels) - 1) * base.family.patch_of(base.denoiser.config)
    check_multiple("size", size, step)
    for side in {side for bucket in buckets_of(recipe, size) for side in bucket}:
        check_multiple("size.step", side, step)
    sources = tuple(
        teacher_source(teacher, recipe.base, beneath.configs, ema=recipe.ema) for teacher in recipe.teachers
    )
    teachers: list[CheckedModel] = []
    reach: dict[int, Reach] = {}
    for teacher, source in zip(recipe.teachers, sources, strict=True):
        name = f"teacher '{teacher.name}'"
        checked = check_model(source, family=base.family, name=name)
        with naming(name):
            check_clip_skip(SimpleNamespace(**checked.skeletons), teacher.clip_skip or None)
        _check_structure(name, checked, base)
        found = _reach(name, checked, base)
        if found is not None:
            reach[len(teachers)] = found
        teachers.append(checked)
    start = _check_start(recipe, base, teachers)
    earlier = _read_earlier(recipe, base) if recipe.earlier else None
    digests = [sha256(*checked.denoiser_files) if with_digests else "" for checked in teachers]
    provenance = tuple(map(_provenance, recipe.teachers, sources, teachers, digests))
    if earlier:
        provenance = (*_earlier_provenance(earlier, base_source, base), *provenance)
    styles = tuple(one.name for one in provenance)
    style_prompts = _read_start(recipe, start, styles)
    _check_adapters(recipe, base, teachers, earlier)
    return Plan(
        base.family,
        base_source,
        sources,
        start,
        earlier,
        style_prompts,
        size,
        frame_of(recipe, size, base),
        base.prediction_type,
        styles,
        provenance,
        sizes_of(recipe, base.family, base.skeletons, styles),
        reach=reach,
    )


def _check_adapters(
    recipe: Recipe, base: CheckedModel, teachers: Sequence[CheckedModel], earlier: StylePrompts | None
) -> None:
    """Refuse what adapters cannot begin from, or what would change weights that adapters stand on."""
    if earlier is not None and earlier.adapters and recipe.styles.trained == "all":
        assert recipe.earlier is not None
        raise UserError(
            f"styles: {recipe.earlier.model} has adapters, which stand on its shared weights; to train these would "
            "change every style. Leave out `rank: 0` and `train: all`."
        )
    if not recipe.styles.has_adapters:
        return
    for teacher, checked in zip(recipe.teachers, teachers, strict=True):
        if checked.prediction_type != base.prediction_type:
            raise UserError(
                f"teacher '{teacher.name}' predicts {checked.prediction_type}, the base {base.prediction_type}: an "
                "adapter begins as the difference of their weights, which says nothing then. Set styles.rank to 0, or "
                "choose a base that predicts what the teacher does."
            )


def _check_noise_weighting(weighting: float, base: CheckedModel) -> None:
    # velocities weigh as a weighting of 1 would have them, and a schedule of theirs may end where there is no signal
    if weighting and base.prediction_type != "epsilon":
        raise UserError(
            f"losses.noise_weighting is {weighting}, which is for a student that predicts epsilon; this base predicts "
            f"{base.prediction_type}. Leave it out."
        )


def _check_start(recipe: Recipe, base: CheckedModel, teachers: Sequence[CheckedModel]) -> ModelSource | None:
    if recipe.start == "average":
        for teacher, checked in zip(recipe.teachers, teachers, strict=True):
            if checked.prediction_type != base.prediction_type:
                raise UserError(
                    f"start is average, but teacher '{teacher.name}' predicts {checked.prediction_type} and the base "
                    f"{base.prediction_type}: only weights of one prediction type can be averaged. Set start to base."
                )
            powers, base_powers = (noise_schedule(one.scheduler_config) for one in (checked, base))
            check_same_schedule(f"start is average, but teacher '{teacher.name}'", powers, "the student's", base_powers)
    if recipe.start in ("base", "average"):
        return None
    source = ModelSource(recipe.start, config=base.configs if Path(recipe.start).is_file() else None)
    checked = check_model(source, family=base.family, name="start")
    _check_structure("start", checked, base)
    powers, base_powers = (noise_schedule(one.scheduler_config) for one in (checked, base))
    check_same_schedule("start", powers, "the student's", base_powers)
    if checked.prediction_type != base.prediction_type:
        raise UserError(
            f"start: the model predicts {checked.prediction_type}, the base {base.prediction_type}, whose scheduler "
            "the result gets. Start from a model that predicts what the base does."
        )
    return source


def _read_earlier(recipe: Recipe, merged: CheckedModel) -> StylePrompts:
    """The style prompts of the merged model that is merged further."""
    assert recipe.earlier is not None
    if (merged.path / FEW_STEPS).is_file():
        raise UserError(
            f"{recipe.earlier.model} was distilled to paint in few steps, which a style that is added to it would not "
            "do. Add to the merge that it was made of, and accelerate that; or accelerate that by a LoRA (`rank`), "
            "which takes part in styles that are added later, too."
        )
    style_prompts = read_side_car(merged.path)
    names = [] if style_prompts is None else style_prompts.names
    check_addition(recipe.earlier.model, names, [teacher.name for teacher in recipe.teachers])
    assert style_prompts is not None  # without one there are no names
    return style_prompts


def _earlier_provenance(style_prompts: StylePrompts, source: ModelSource, merged: CheckedModel) -> Sequence[Provenance]:
    """Where the earlier styles came from; where that is not known, the merged model itself."""
    if style_prompts.provenance:
        return style_prompts.provenance
    told = (str(source.model), sha256(*merged.denoiser_files), merged.family.name, merged.prediction_type)
    return [Provenance(name, *told) for name in style_prompts.names]


def _read_start(recipe: Recipe, start: ModelSource | None, styles: Sequence[str]) -> StylePrompts | None:
    """The style prompts that a student starts with; None for new ones."""
    style_prompts = None if start is None else read_side_car(locate(start))
    if style_prompts is not None and style_prompts.names != list(styles):
        whose = "the earlier styles and the teachers" if recipe.earlier else "the teachers"
        raise UserError(
            f"start: {recipe.start} is a merged model of {', '.join(style_prompts.names)}, {whose} are "
            f"{', '.join(styles)}. To train it further, name the same in the same order; `dmm add` adds others."
        )
    if style_prompts is None and paints_itself(recipe):
        raise UserError(
            f"data.synthesize.student: {recipe.start}, from which the student starts, has no styles to paint in. Start "
            "from a merged model, or leave it out."
        )
    if style_prompts is None and start is not None and recipe.earlier:
        raise UserError(
            f"start: {recipe.start} has no styles. What is added to a merged model starts from that model, or from one "
            "that has the new styles already; leave it out."
        )
    return style_prompts


def _check_structure(name: str, model: CheckedModel, base: CheckedModel) -> None:
    """Refuse a model whose denoiser has another architecture than the base's."""
    ours, theirs = (_structure(one.denoiser) for one in (base, model))
    # what tells families apart first
    for key in dict.fromkeys(["cross_attention_dim", *ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            advice = _ADVICE.get(key, "Choose teachers of one architecture.")
            kind = base.family.denoiser.title
            raise UserError(f"{name}: the {kind} has {key} {theirs.get(key)}, the student {ours.get(key)}. {advice}")


def _reach(name: str, model: CheckedModel, base: CheckedModel) -> Reach | None:
    """What a teacher can be asked about; None of everything, at the student's own timesteps.

    Raises: UserError: its schedule has too few of the student's signal powers.
    """
    powers, asked = (noise_schedule(one.scheduler_config) for one in (model, base))
    needs_signal = (model.prediction_type, base.prediction_type) == ("epsilon", "v_prediction")
    reach = Reach(powers, num_answerable(asked, powers, needs_signal=needs_signal))
    if same_schedules(powers, asked) and reach.num_timesteps == len(asked):
        return None
    num_too_clean = int((asked > powers[0]).sum())
    if reach.num_timesteps - num_too_clean < _LEAST_REACH * len(asked):
        check_same_schedule(name, powers, "the student's", asked)
    return reach


def _structure(denoiser: Any) -> dict[str, Any]:
    """Its config, one way of writing it for all that mean the same."""
    config = {name: value for name, value in denoiser.config.items() if name[0] != "_" and name not in _HARMLESS}
    for name, value in config.items():
        if isinstance(value, list | tuple):
            config[name] = value[0] if len(set(map(str, value))) == 1 and name != "block_out_channels" else tuple(value)
    return config


def _provenance(teacher: Teacher, source: ModelSource, checked: CheckedModel, digest: str) -> Provenance:
    return Provenance(teacher.name, str(source), digest, checked.family.name, checked.prediction_type)
