"""Everything that is decided and checked of a soup before a value is merged."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Family, Stranger, transformer_of
from dmm.files.runs import check_finished
from dmm.formats.configs import find_configs
from dmm.formats.lora import lora_file, read_lora
from dmm.formats.original_layout import is_unread
from dmm.formats.schedules import (
    STOCK,
    check_same_schedule,
    is_flow,
    marks,
    noise_schedule,
    predicted,
    read_scheduler_config,
    same_schedules,
    untold_by_marks,
    with_schedule,
)
from dmm.formats.tensors import Header
from dmm.soup.blocks import Blocks
from dmm.soup.models import TEXT_ENCODERS, Layout, Names, OpenModel, open_model, put_lora, translate
from dmm.soup.reading import WeightFile
from dmm.soup.recipe import DENSITIES, SoupRecipe
from dmm.soup.registry import METHODS, Method
from dmm.soup.sources import Kept, Source
from dmm.soup.transformers import check_guidance, check_translates, is_transformer_alone, put_lora_by_names
from dmm.soup.writing import Declared

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Merged:
    """A tensor of the soup, and what it is made of."""

    name: str
    declared: Declared
    models: tuple[Source, ...]
    weights: tuple[float, ...]
    base: Source | None = None
    origin: Source | None = None
    keys: tuple[tuple[int, int], ...] = ()
    """Of DARE's masks, one a model."""
    copied: bool = False
    """Taken from the first of ``models`` as it is."""
    constant: Tensor | None = None
    """What it holds, whatever the models have there."""


@dataclass(frozen=True)
class Plan:
    """A soup that was found fit to be made.

    Attributes:
        tensors: in the order in which they are read and written.
        models: all that is read; the base and the origin, if any, before the teachers.
        configs: the folder whose configs and tokenizer a folder gets.
        scheduler: the scheduler config of what is made; None where nothing says what it is, as of most single files.
        notes: what the user should be told, and may be content with.
    """

    recipe: SoupRecipe
    method: Method
    layout: Layout
    family: Family | Stranger
    prediction_type: str | None
    tensors: tuple[Merged, ...]
    base: OpenModel | None
    origin: OpenModel | None
    teachers: tuple[OpenModel, ...]
    configs: Path | None
    scheduler: Mapping[str, Any] | None
    density: float
    notes: tuple[str, ...]
    prefix: str = ""
    """What the soup's file has before every name: as the first model that is read."""

    @property
    def files(self) -> list[WeightFile]:
        """All files that are read, each once."""
        models = [model for model in (self.base, self.origin, *self.teachers) if model is not None]
        return list({id(file): file for model in models for file in model.files.values()}.values())


@contextmanager
def plan_soup(recipe: SoupRecipe, layout: Layout) -> Iterator[Plan]:
    """Open all models of a recipe, check that they can be merged, and decide what each tensor is made of.

    Args:
        recipe: of a full model.
        layout: of what is written.
    Returns: the plan; its files are open within the block.
    Raises: UserError: the first thing that is wrong.
    """
    opened: dict[tuple[Path, bool], OpenModel] = {}
    try:
        yield _plan(recipe, layout, opened)
    finally:
        for model in opened.values():
            for file in model.files.values():
                file.close()


def _plan(recipe: SoupRecipe, layout: Layout, opened: dict[tuple[Path, bool], OpenModel]) -> Plan:
    method = METHODS[recipe.method]

    def load(model: str, label: str, *, ema: bool = False) -> OpenModel:
        path = _locate(model)
        if (path, ema) not in opened:
            opened[path, ema] = open_model(path, label, ema=ema)
        return replace(opened[path, ema], label=label)

    base = None if recipe.base is None else load(recipe.base, "base", ema=recipe.ema)
    origin = None if recipe.origin is None else load(recipe.origin, "origin")
    # in the order of their names, so that the order of a recipe, or of additions, changes no bit
    given = recipe.teachers if method.ordered else sorted(recipe.teachers, key=lambda teacher: teacher.name)
    teachers = [
        load(
            str(teacher.model or recipe.base),
            f"teacher '{teacher.name}'",
            ema=recipe.ema if teacher.model is None else teacher.ema,
        )
        for teacher in given
    ]
    models = [model for model in (base, origin, *teachers) if model is not None]
    _check_alike(models)
    alone = layout == "file" and all(is_transformer_alone(model) for model in models)
    if any(transformer_of(model.family) for model in models):
        check_guidance(models)

    configs = recipe.config or next((model.path for model in models if model.layout == "folder"), None)
    _check_schedules(models, configs)
    if not alone:
        check_translates(models, layout)
    mixed = not alone and (
        any(model.layout != layout for model in models) or any(teacher.all_loras for teacher in given)
    )
    notes = []
    if configs is None and (mixed or layout == "folder"):
        configs = _find_configs(models[0])
    said = next((model.prediction_type for model in models if model.prediction_type), None)
    prediction_type = said
    if said is None and configs is not None:
        prediction_type = predicted(read_scheduler_config(configs))
    scheduler = _scheduler_of(models, configs, prediction_type)
    if mixed:
        assert configs is not None
        names = Names.of(configs)
        base, origin = (model and translate(model, layout, names) for model in (base, origin))
        teachers = [translate(teacher, layout, names) for teacher in teachers]
        for i, teacher in enumerate(given):
            for lora in teacher.all_loras:
                layers = read_lora(lora.path, names.skeletons, names.family)
                teachers[i] = put_lora(teachers[i], layers, lora_file(lora.path), lora.scale, names)

    if alone:
        for i, teacher in enumerate(given):
            for lora in teacher.all_loras:
                teachers[i], note = put_lora_by_names(teachers[i], lora_file(lora.path), lora.scale)
                notes += [note] if note else []

    plan = Plan(
        recipe,
        method,
        layout,
        models[0].family,
        prediction_type,
        (),
        base,
        origin,
        tuple(teachers),
        configs,
        scheduler,
        recipe.density or DENSITIES.get(recipe.method, 1.0),
        (),
        models[0].prefix,
    )
    averaged = [model.label for model in models if model.leaves_average]
    if averaged:
        notes.append(f"the EMA copies of {', '.join(averaged)} are left out; 'ema: true' takes them instead")
    tensors = [*_plan_tensors(plan, [teacher.name for teacher in given], notes)]
    if layout == "file":
        known = {**(scheduler or STOCK), "prediction_type": plan.prediction_type}
        tensors += [
            Merged(name, Declared(mark.dtype, tuple(mark.shape)), (), (), constant=mark)
            for name, mark in marks(known).items()
        ]
        notes += [f"of the soup: {note}" for note in [untold_by_marks(known)] if note]
    return replace(plan, tensors=tuple(tensors), notes=tuple(notes))


def _check_schedules(models: Sequence[OpenModel], configs: Path | None) -> None:
    """Refuse models of different noise schedules; a single file that says nothing follows the configs."""
    first, *others = ((model, noise_schedule(_own_scheduler(model, configs))) for model in models)
    for model, schedule in others:
        check_same_schedule(f"{model.label}: {model.path}", schedule, f"that of {first[0].label}", first[1])


def _scheduler_of(
    models: Sequence[OpenModel], configs: Path | None, prediction_type: str | None
) -> dict[str, Any] | None:
    """The scheduler config of a soup: that of the configs where it fits, or else its first model's.

    Args:
        prediction_type: of the soup.
    Returns: None where single files say nothing of theirs and there are no configs.
    """
    if configs is None and not any(model.scheduler for model in models):
        return None
    own, followed = _own_scheduler(models[0], configs), _followed_scheduler(configs)
    chosen = followed if same_schedules(noise_schedule(followed), noise_schedule(own)) else own
    # schedulers of flows have no such setting: there is one only
    return {**chosen} if is_flow(chosen) else {**chosen, "prediction_type": prediction_type}


def _own_scheduler(model: OpenModel, configs: Path | None) -> Mapping[str, Any]:
    if model.layout == "folder":
        return model.scheduler
    return with_schedule(_followed_scheduler(configs), model.scheduler)


def _followed_scheduler(configs: Path | None) -> Mapping[str, Any]:
    return STOCK if configs is None else read_scheduler_config(configs)


def _find_configs(model: OpenModel) -> Path:
    """The configs of single files where no folder is among them: a folder needs them, and a LoRA's layers by them."""
    if not isinstance(model.family, Family):
        raise UserError(
            f"{model.label}: {model.path} is a single file, and so are the others. Give as config: a stock pipeline "
            "folder of the same architecture."
        )
    declared = {
        name: source.file.tensors[source.name] for name, source in model.tensors.items() if isinstance(source, Kept)
    }
    return find_configs(model.path, Header(declared, dict(model.metadata)), model.family)


def _plan_tensors(plan: Plan, names: Sequence[str], notes: list[str]) -> Iterator[Merged]:
    """What each tensor is made of.

    Args:
        names: of the teachers, in the plan's order.
        notes: gets what the user should be told.
    """
    recipe, base, teachers = plan.recipe, plan.base, plan.teachers
    reference = base or teachers[0]
    weights_of = _weights(plan, names, list(reference.tensors))
    precision = _DTYPES.get(recipe.precision or "")
    for name in _names(plan, notes):
        sources = {
            label: model.tensors[name]
            for label, model in zip((*names, "the base"), (*teachers, base), strict=True)
            if model is not None and name in model.tensors
        }
        of_base = sources.pop("the base", None)
        first = of_base or next(iter(sources.values()))
        for label, source in sources.items():
            if source.shape != first.shape:
                raise UserError(
                    f"'{name}' has shape {source.shape} in teacher '{label}' and {first.shape} in "
                    f"{'the base' if of_base else 'the first'}. Only models of one architecture can be merged."
                )
        dtype = first.dtype
        if dtype.is_floating_point and precision is not None:
            dtype = precision
        if name.endswith("position_ids"):
            yield _position_ids(name, [of_base, *sources.values()], notes)
            continue
        merged = Merged(name, Declared(dtype, first.shape), (first,), (1.0,), copied=True)
        of_text_encoder = name.startswith(TEXT_ENCODERS)
        is_base = of_base is not None and (
            (of_text_encoder and recipe.text_encoder == "base")
            or (len(sources) < len(names) and (recipe.missing == "base" or not sources))
        )
        if is_base or not first.dtype.is_floating_point:
            yield merged
            continue
        weights = weights_of(name)
        present = [weights[names.index(label)] for label in sources]
        if plan.method.weights != "scales":
            total = sum(present)
            if not total:
                raise UserError(
                    f"'{name}': the weights of the models that have it are all 0. Change weights or blocks."
                )
            present = [weight / total for weight in present]
        if plan.method.needs_base and of_base is None:
            raise UserError(
                f"the base has no '{name}', which '{recipe.method}' needs it for. Choose another method, or set "
                "missing: base to leave the tensor out."
            )
        of_origin = None if plan.origin is None else plan.origin.tensors.get(name)
        if plan.origin is not None and (of_origin is None or of_origin.shape != first.shape):
            raise UserError(f"the origin has no '{name}' of shape {first.shape}. Choose one of the same architecture.")
        keys = tuple(_key(recipe.seed, label, name) for label in sources)
        yield replace(
            merged,
            models=tuple(sources.values()),
            weights=tuple(present),
            base=of_base if plan.method.needs_base else None,
            origin=of_origin,
            keys=keys,
            copied=False,
        )


def _names(plan: Plan, notes: list[str]) -> list[str]:
    """The tensors that the soup will have, in the reference's order; refuse what some models lack."""
    models = [model for model in (plan.base, *plan.teachers) if model is not None]
    names = dict.fromkeys(name for model in models for name in model.tensors)
    chosen = []
    for name in names:
        having = [model for model in models if name in model.tensors]
        if len(having) == len(models):
            chosen.append(name)
            continue
        if name.endswith("position_ids") and models[0] in having:
            chosen.append(name)
            continue
        if is_unread(name, plan.family):
            notes.append(f"'{name}', which nothing reads, is not in all models and was left out")
            continue
        lacking = next(model for model in models if name not in model.tensors)
        if plan.recipe.missing == "error":
            raise UserError(
                f"{lacking.label}: {lacking.path} lacks '{name}', which {having[0].label} has. Say with missing: base "
                "or missing: present what is to be done about tensors that some models lack."
            )
        if plan.recipe.missing == "base" and models[0] not in having:
            notes.append(f"'{name}' is not in {models[0].label} and was left out")
            continue
        chosen.append(name)
    return chosen


def _position_ids(name: str, sources: Sequence[Source | None], notes: list[str]) -> Merged:
    """0, 1, 2, ...: no average, and no half-precision copy of it, is right."""
    found = [source for source in sources if source is not None]
    shape = found[0].shape
    constant = torch.arange(torch.Size(shape).numel())
    for source in found:
        values = source.read(0, source.num_elements, source.dtype)
        if values.is_floating_point() or not torch.equal(values.long(), constant):
            notes.append(f"'{name}' is damaged in {source.path}; the soup's is 0 to {len(constant) - 1} as it must be")
    return Merged(name, Declared(torch.int64, shape), tuple(found), (), constant=constant)


def _weights(plan: Plan, names: Sequence[str], tensors: Sequence[str]) -> Callable[[str], Sequence[float]]:
    """The teachers' weights in each tensor, as the recipe gives them.

    Raises: UserError: a rule is for nothing, or a list has a wrong number of weights.
    """
    recipe = plan.recipe
    general = [recipe.weights.get(name, 1.0) for name in names]
    if not recipe.blocks and not recipe.mbw:
        return lambda _: general
    blocks = Blocks.of(tensors)
    special: dict[str, list[float]] = {}
    for teacher, values in recipe.mbw.items():
        if not blocks.names:
            raise UserError(
                f"mbw.{teacher}: its weights are those of a UNet's blocks, which these models have none of. Give "
                "weights under blocks, by a /regular expression/ for tensors' names."
            )
        if len(values) != len(blocks.names):
            raise UserError(
                f"mbw.{teacher}: found {len(values)} weights; these models have {len(blocks.names)} blocks: "
                f"{', '.join(blocks.names)}."
            )
        value_of = dict(zip(blocks.names, values, strict=True))
        for tensor in tensors:
            weights = special.setdefault(tensor, list(general))
            share = weights[names.index(teacher)] = value_of[blocks.block_of(tensor)]
            if plan.method.weights == "relative":
                weights[1 - names.index(teacher)] = 1 - share
    for pattern, by_name in recipe.blocks.items():
        for tensor in blocks.select(pattern, tensors):
            weights = special.setdefault(tensor, list(general))
            for teacher, weight in by_name.items():
                weights[names.index(teacher)] = weight
    return lambda tensor: special.get(tensor, general)


def _check_alike(models: Sequence[OpenModel]) -> None:
    """Refuse models of different families, or that predict different things."""
    first = models[0]
    for model in models[1:]:
        if model.family != first.family:
            raise UserError(
                f"{model.label}: {model.path} is {model.family.title}, {first.label} {first.family.title}. "
                "Choose models of one family."
            )
    saying = [model for model in models if model.prediction_type]
    for model in saying[1:]:
        if model.prediction_type != saying[0].prediction_type:
            raise UserError(
                f"{model.label}: {model.path} predicts {model.prediction_type}, {saying[0].label} "
                f"{saying[0].prediction_type}. Their average would predict neither; choose models of one prediction "
                "type."
            )


def _locate(model: str) -> Path:
    path = Path(model)
    if path.exists():
        check_finished(path)
        return path
    from dmm.models.teachers import ModelSource, locate  # fetching from the hub takes all the libraries

    return locate(ModelSource(model))


def _key(seed: int, *names: str) -> tuple[int, int]:
    """A random generator's key for one tensor of one model."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def declared(tensors: Sequence[Merged]) -> Mapping[str, Declared]:
    """What a file of these tensors holds."""
    return {tensor.name: tensor.declared for tensor in tensors}
