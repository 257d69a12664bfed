"""Everything that is checked of a merge before anything large is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dmm.data import CaptionedImages, ImageDataset, ImageFolder, Synthesis
from dmm.errors import UserError
from dmm.families import Family, Frame
from dmm.files.digest import sha256
from dmm.files.few_steps import FILE as FEW_STEPS
from dmm.files.outputs import check_disk, held_bytes
from dmm.files.prompts import read_prompts
from dmm.formats.schedules import check_same_schedule, noise_schedule, same_schedules
from dmm.maths.buckets import Size, bucket_sizes
from dmm.maths.diffusion import PredictionType
from dmm.maths.schedules import num_answerable
from dmm.maths.sharing import share_batch
from dmm.models.calibration import layers_of
from dmm.models.conditioning import check_clip_skip
from dmm.models.discriminator import build_head
from dmm.models.side_car import read_side_car
from dmm.models.style_names import check_addition
from dmm.models.styles import Provenance, StylePrompts
from dmm.models.teachers import CheckedModel, ModelSource, check_model, locate, naming
from dmm.pipeline.samplers import check_multiple
from dmm.recipes.recipe import Recipe, Teacher
from dmm.training.calibrating import budget_of_rank, num_kept
from dmm.training.costs import HALF, Sizes
from dmm.training.subject import Denoisers, Subject

UNKNOWN_RANK = 16
"""What a style of a given error is taken to come to, before it is calibrated."""

# the share of the student's timesteps below which a teacher would leave too much untaught
_LEAST_REACH = 0.8
# of a UNet's config, what says nothing of what it computes
_ADVICE = {
    "cross_attention_dim": "Choose teachers of one family.",
    "guidance_embeds": (
        "One was distilled to read a guidance scale, the other reads none, and no student paints as both: choose "
        "teachers of one kind."
    ),
}
"""Where configs differ, what to do about it."""
_HARMLESS = ("sample_size", "upcast_attention")


@dataclass(frozen=True)
class Reach:
    """What a teacher of another noise schedule can be asked about.

    Attributes:
        alphas_cumprod: (T,), its own schedule.
        num_timesteps: of the student's, how many from the first on.
    """

    alphas_cumprod: Tensor
    num_timesteps: int


@dataclass(frozen=True)
class Plan:
    """A merge that was found fit to run.

    Attributes:
        family: of all its models.
        base: gives the student its VAE and text encoder; a merged model, where that is merged further.
        teachers: where their weights are.
        start: the model that the student begins as; None for the base, or for the teachers' average.
        earlier: the style prompts of the merged model that is merged further.
        style_prompts: those of the start, where it is a merged model of all the styles.
        size: of the pictures, in pixels a side.
        frame: what the models are told of that.
        prediction_type: of the base, and so of the student.
        styles: the student's.
        provenance: of each style.
        sizes: how many weights take part.
        subject: what of these models is merged.
        reach: by index, of the teachers whose noise schedule is not the student's.
    """

    family: Family
    base: ModelSource
    teachers: tuple[ModelSource, ...]
    start: ModelSource | None
    earlier: StylePrompts | None
    style_prompts: StylePrompts | None
    size: int
    frame: Frame
    prediction_type: PredictionType
    styles: tuple[str, ...]
    provenance: tuple[Provenance, ...]
    sizes: Sizes
    subject: Subject = field(default_factory=Denoisers)
    reach: Mapping[int, Reach] = field(default_factory=dict)


def check_machine(recipe: Recipe, num_processes: int, device: torch.device) -> None:
    """Check that this machine can do what a recipe asks.

    Raises: UserError: it does not compute in that precision, a tracker is not installed, or batches cannot be shared.
    """
    check_precision(recipe.training.precision, device)
    check_trackers(recipe.logging.trackers)
    _check_batch(recipe, num_processes)


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
    beneath = check_model(_named_base(recipe), name="base") if recipe.earlier else base
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
    digests = [sha256(*checked.unet_files) if with_digests else "" for checked in teachers]
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


def frame_of(recipe: Recipe, size: int, base: CheckedModel) -> Frame:
    """What student and teachers are told of the pictures' size.

    Raises: UserError: the recipe says something of which the family's models read nothing.
    """
    said, whole = recipe.frame, Frame.whole(size, size)
    frame = Frame(said.original or whole.original, said.corner, said.target or whole.target)
    if frame != whole and not base.family.read_size(frame):
        raise UserError(f"frame: {base.family.title} models read nothing of a picture's size; leave it out.")
    return frame


def buckets_of(recipe: Recipe, size: int) -> list[Size]:
    """The sizes that the recipe's images are sorted into; none where all are square.

    Raises: UserError: there is none between the shortest and the longest side.
    """
    said = recipe.buckets
    if said is None:
        return []
    least, most = said.least or size // 2, said.most or 2 * size
    sizes = bucket_sizes(size, step=said.step, least=least, most=most)
    if not sizes:
        raise UserError(
            f"size.buckets: no size of {size} x {size} pixels' area has sides from {least} to {most} in steps of "
            f"{said.step}. Choose others."
        )
    return sizes


def with_size(recipe: Recipe) -> Recipe:
    """A recipe that says the size of its pictures: the base's own, where it does not.

    Raises: UserError: something is wrong with the base, or it does not say.
    """
    if recipe.size is not None:
        return recipe
    base = check_model(base_of(recipe), name="base")
    return recipe.model_copy(update={"size": own_size(base.path, base.skeletons, base.family)})


def base_of(recipe: Recipe) -> ModelSource:
    """What gives the student its VAE and text encoder."""
    return ModelSource(recipe.earlier.model) if recipe.earlier else _named_base(recipe)


def _named_base(recipe: Recipe) -> ModelSource:
    """What LoRAs are put on, and whose configs single files follow."""
    return ModelSource(recipe.base, config=recipe.config, ema=recipe.ema)


def own_size(path: Path | str, skeletons: Mapping[str, Any], family: Family) -> int:
    """Of the pictures that a model was made for, in pixels a side; the shorter one.

    Raises: UserError: it does not say.
    """
    own = family.sample_size_of(skeletons[family.denoiser.name].config)
    if not own:
        raise UserError(f"size: {path} does not say of what size its pictures are; say it, such as 512.")
    side: int = own if isinstance(own, int) else min(own)
    return side * 2 ** (len(skeletons["vae"].config.block_out_channels) - 1)


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


def shares_of(recipe: Recipe) -> list[float]:
    """Each teacher's share of a batch; the last is the earlier student's, where there is one to be kept."""
    kept = recipe.regularization
    whole = sum(teacher.weight for teacher in recipe.teachers)
    shares = [(1 - kept) * teacher.weight / whole for teacher in recipe.teachers]
    return [*shares, kept] if kept else shares


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse a disk that what a run writes does not fit on; checkpoints that are there already count as written.

    Raises: UserError.
    """
    missing = num_bytes - held_bytes(folder)
    check_disk(folder, missing, "the checkpoints and the result", "lower checkpoint.keep, or name another output")


def num_painters(recipe: Recipe, styles: Sequence[str]) -> int:
    """How many models paint data, each style of a merged one being one."""
    if recipe.kind == "controlnet":  # the base paints what they guide
        return 1
    painters = len(styles if paints_earlier(recipe) else recipe.teachers)
    return painters + (len(styles) if paints_itself(recipe) else 0)


def paints_itself(recipe: Recipe) -> bool:
    """Whether the student, as it starts, paints data in each of its styles."""
    return recipe.data.synthesize is not None and recipe.data.synthesize.student > 0


def paints_earlier(recipe: Recipe) -> bool:
    """Whether the earlier student, in each of its styles, paints data beside the teachers."""
    return recipe.data.synthesize is not None and recipe.regularization > 0


def open_source(recipe: Recipe, styles: Sequence[str]) -> CaptionedImages | Synthesis:
    """What the recipe's data are made from.

    Args:
        styles: the student's.
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
        painted.count * num_painters(recipe, styles),
        steps=painted.steps,
        guidance_scale=painted.guidance,
        seed=painted.seed,
    )


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that a device does not train in.

    Raises: UserError.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("training.precision is fp16, which a CPU does not train in; set it to bf16 or fp32.")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"training.precision is bf16, which {torch.cuda.get_device_name(device)} does not compute; set it to fp16 "
            "or fp32."
        )


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises: UserError.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    assert all(name in LOGGER_TYPE_TO_CLASS for name in trackers)  # the recipe knows accelerate's names
    for name in trackers:
        if name not in [str(available) for available in get_available_trackers()]:
            raise UserError(
                f"logging.trackers names {name}, which is not installed; install its package or leave it out."
            )


def _check_batch(recipe: Recipe, num_processes: int) -> None:
    try:
        for process in range(num_processes):
            # of one style, where these are trained by themselves
            shares = shares_of(recipe) if recipe.styles.trained == "all" else [1.0]
            share_batch(recipe.training.batch_size, shares, num_processes, process)
    except ValueError as error:
        is_kept = recipe.regularization
        last = f" (teacher {len(recipe.teachers)} is the earlier merge, of earlier.regularization)" if is_kept else ""
        raise UserError(f"training.batch_size: {error}. Raise it, or that teacher's weight{last}.") from error


def teacher_source(teacher: Teacher, base: str, configs: Path | None, *, ema: bool = False) -> ModelSource:
    """Where a recipe's teacher comes from.

    Args:
        base: the recipe's word for it, which a teacher without a model of its own takes.
        configs: the pipeline folder whose configs single files follow that have none of their own in the recipe; None
            where each finds its own.
        ema: the recipe's word for the base.
    """
    model = base if teacher.model is None else teacher.model
    return ModelSource(
        model,
        config=(teacher.config or configs) if Path(model).is_file() else None,
        loras=tuple((lora.path, lora.scale) for lora in teacher.all_loras),
        vae=teacher.vae,
        prediction_type=teacher.prediction_type,
        ema=ema if teacher.model is None else teacher.ema,
        allow_pickle=teacher.allow_pickle,
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
    told = (str(source.model), sha256(*merged.unet_files), merged.family.name, merged.prediction_type)
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
    """Refuse a model whose UNet has another architecture than the base's."""
    ours, theirs = (_structure(one.denoiser) for one in (base, model))
    # what tells families apart first
    for key in dict.fromkeys(["cross_attention_dim", *ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            advice = _ADVICE.get(key, "Choose teachers of one architecture.")
            kind = "UNet" if base.family.denoiser.name == "unet" else base.family.denoiser.name
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


def _structure(unet: Any) -> dict[str, Any]:
    """A UNet's config, one way of writing it for all that mean the same."""
    config = {name: value for name, value in unet.config.items() if name[0] != "_" and name not in _HARMLESS}
    for name, value in config.items():
        if isinstance(value, list | tuple):
            config[name] = value[0] if len(set(map(str, value))) == 1 and name != "block_out_channels" else tuple(value)
    return config


def _provenance(teacher: Teacher, source: ModelSource, checked: CheckedModel, digest: str) -> Provenance:
    return Provenance(teacher.name, str(source), digest, checked.family.name, checked.prediction_type)


def sizes_of(recipe: Recipe, family: Family, skeletons: Mapping[str, Any], styles: Sequence[str]) -> Sizes:
    """How many weights take part in a merge.

    Args:
        skeletons: the base's components.
        styles: the student's.
    """
    denoiser, *readers = (skeletons[component.name] for component in family.present(skeletons))
    with torch.device("meta"):
        prompts = StylePrompts(list(styles), 0 if recipe.styles.has_adapters else family.width(denoiser))
        head = build_head(family.anatomy.width(denoiser), len(styles))
    backbone = _num_weights(family.anatomy.cut(denoiser))
    has_adversary = recipe.losses.adversarial > 0
    return Sizes(
        denoiser=_num_weights(denoiser),
        style_prompts=_num_weights(prompts),
        readers=sum(map(_num_weights, readers)),
        backbone=backbone if has_adversary else 0,
        head=_num_weights(head) if has_adversary else 0,
        **adapter_sizes(recipe, denoiser),
    )


def adapter_sizes(recipe: Recipe, denoiser: Any) -> dict[str, int]:
    """Of :class:`dmm.training.costs.Sizes`, what is of styles that are adapters of a model."""
    adapter, calibrated = _num_of_adapter(recipe, denoiser), _num_calibrated(recipe, denoiser)
    return {"num_styles": len(recipe.teachers), "adapter": adapter, "calibrated": calibrated}


def _num_of_adapter(recipe: Recipe, denoiser: Any) -> int:
    """The parameters of a style's adapter, and the whole differences of what is no layer's weight, at most."""
    styles = recipe.styles
    if not styles.has_adapters:
        return 0
    if styles.num_bytes is not None:
        return styles.num_bytes // HALF
    # what an error comes to is known only once the teachers were looked at
    return budget_of_rank(denoiser, styles.rank or UNKNOWN_RANK) + _num_offsets(denoiser)


def _num_calibrated(recipe: Recipe, denoiser: Any) -> int:
    if not recipe.styles.has_adapters:
        return 0
    return budget_of_rank(denoiser, num_kept(recipe.styles)) + _num_offsets(denoiser)


def _num_offsets(denoiser: Any) -> int:
    layers = layers_of(denoiser)
    return sum(parameter.numel() for name, parameter in denoiser.named_parameters() if name not in layers)


def _num_weights(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
