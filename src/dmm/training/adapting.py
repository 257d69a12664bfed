"""A merge whose styles are adapters: each teacher calibrated, ranks dealt, then one style trained after another.

Beside what every run has, its folder gets::

    merged/calibration/NAME.safetensors    what is known of each style before training
           untrained/                      a merge already: the calibrated adapters, without any training
           training/NAME/                  a style's own run: its log and its checkpoints

The shared weights are frozen, so that no style touches another: only one teacher is in memory at a time, and a run
that was stopped goes on with the style that it was at.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from dmm.errors import UserError
from dmm.families import components_of, set_denoiser
from dmm.files.runs import CALIBRATION, CHECKPOINTS, STYLE_RUNS, UNTRAINED, step_of
from dmm.files.sizes import told_bytes
from dmm.formats.lora import LowRank, read_lora
from dmm.maths.schedules import timesteps_of_equal_power
from dmm.maths.sharing import Group, share_batch
from dmm.models.adapter_files import file_stems
from dmm.models.adapters import NOTHING, Adapter, Factors, KeptWeights
from dmm.models.adapting import twin_of
from dmm.models.student import AdaptedStudent, TrainedAdapter, grow
from dmm.models.styles import StylePrompts, style_weights, term_change
from dmm.models.teachers import freeze
from dmm.models.unfused import set_changes
from dmm.pipeline.styled import add_styles
from dmm.recipes.recipe import Recipe
from dmm.recipes.teacher import Teacher
from dmm.training.batches import Batches, Role
from dmm.training.building import (
    DTYPES,
    build_adversary,
    open_teacher,
    open_teachers,
    role_of,
    roles_of,
    shared_weights,
)
from dmm.training.calibrating import (
    Calibrated,
    Sample,
    budget_of_rank,
    calibrate,
    costs_of,
    deal_by_budget,
    deal_by_error,
    num_kept,
    read_calibrated,
    shapes_of,
    write_calibrated,
)
from dmm.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint
from dmm.training.distill import Imitation
from dmm.training.merge_plan import Plan, Reach
from dmm.training.preparing import free_memory
from dmm.training.processes import on_all, on_main
from dmm.training.reading import Text
from dmm.training.trainer import STUDENT, Trainer
from dmm.training.watch import Watch

NUM_BYTES = 2
"""Of a parameter of an adapter on disk."""

_CALIBRATED = 0x85EBCA6B  # a factor that takes seeds far away from those that people choose, and from the watch's


@dataclass(frozen=True)
class Run:
    """What a merge with adapters has at hand once its data are there.

    Attributes:
        base: the pipeline that becomes the merged one.
        text: what the styles change of its text encoders.
        new_batches: of the styles and roles that it is given; what is made lacks whose batches, and their randomness.
        new_watch: of a model, and of likewise new batches, by how many styles each teacher has; None where none is
            wanted.
        show: paints samples with a pipeline, in some styles, by step; None where none are wanted.
        save: the pipeline, as the result, or into a folder of the run's.
    """

    recipe: Recipe
    plan: Plan
    folder: Path
    accelerator: Accelerator
    base: Any
    text: Text
    new_batches: Callable[[Sequence[str], Sequence[Role]], Callable[..., Batches]]
    new_watch: Callable[[nn.Module, Callable[..., Batches], Sequence[int], Sequence[str]], Watch | None]
    show: Callable[[Any, list[str], int], None] | None
    save: Callable[[str | None], None]

    @property
    def new_styles(self) -> list[str]:
        """Those of the recipe's teachers."""
        return [teacher.name for teacher in self.recipe.teachers]


def adapt(run: Run) -> None:
    """Calibrate, deal and save; then train, unless the recipe wants no training, and save again.

    Raises: UserError; Stopped: see :meth:`dmm.training.trainer.Trainer.train`.
    """
    denoiser = shared_weights(run.recipe, run.plan, run.base)
    set_seed(run.recipe.seed)  # a new style's prompt, where there are prompts, is drawn
    prompts = _prompts_of(run.plan, run.new_styles)
    starting, exact = _starting_adapters(run, denoiser, prompts)
    prompts.adapters = {**prompts.adapters, **{name: stored(one, name in exact) for name, one in starting.items()}}
    # what is trained may be in half precision: the result has the base's own bits
    trained = copy.deepcopy(denoiser) if run.recipe.styles.trained == "adapters" else None
    run.plan.subject.put(run.base, denoiser)
    run.plan.subject.add_styles(run.base, prompts)
    if run.recipe.styles.trained != "none":
        on_main(lambda: run.save(UNTRAINED))
    if run.recipe.styles.trained == "all":
        _train_all(run, denoiser, prompts, starting)
    elif trained is not None:
        trained.to(run.accelerator.device, DTYPES[run.recipe.training.precision])
        before = 0
        # a teacher that is the start itself has nothing to learn
        for name in [one for one, adapter in starting.items() if one not in exact and _paints_otherwise(adapter)]:
            recipe = _of_style(run.recipe, name)
            adapter = _train(run, recipe, trained, prompts, name, starting[name], before)
            prompts.adapters = {**prompts.adapters, name: stored(adapter)}
            before += recipe.training.steps
    on_main(lambda: run.save(None))


def _paints_otherwise(adapter: Adapter) -> bool:
    return bool(adapter.factors or adapter.offsets)


def _prompts_of(plan: Plan, new_styles: Sequence[str]) -> StylePrompts:
    """What the styles are so far."""
    if plan.style_prompts is not None:
        return plan.style_prompts
    if plan.earlier is not None:
        return grow(plan.earlier, new_styles)
    return StylePrompts(list(plan.styles), 0)


def _starting_adapters(run: Run, denoiser: nn.Module, prompts: StylePrompts) -> tuple[dict[str, Adapter], set[str]]:
    """The new styles' adapters before any training, float32, and which of these are their teachers' own."""
    if all(name in prompts.adapters for name in run.new_styles):  # an earlier stage has trained them
        return {name: prompts.adapters[name] for name in run.new_styles}, set()
    paths = _calibration_files(run)
    on_all(lambda: _calibrate_share(run, denoiser, prompts, paths))
    found = {name: read_calibrated(path) for name, path in paths.items()}
    costs, shapes, styles = costs_of(denoiser), shapes_of(denoiser), run.recipe.styles
    if styles.error is not None:
        dealt = [deal_by_error(one, costs, styles.error) for one in found.values()]
    else:
        dealt = deal_by_budget(list(found.values()), costs, _budget(run, denoiser, found))
    starting, exact = {}, set()
    for (name, one), ranks in zip(found.items(), dealt, strict=True):
        adapter = one.own_adapter() if ranks is None else one.adapter(ranks, shapes)
        starting[name] = replace(adapter, text=run.text.get(name, {}))
        if ranks is None:
            exact.add(name)
    if run.accelerator.is_main_process:
        for name, one in found.items():
            tqdm.write(_told(name, one, starting[name], name in exact), file=sys.stderr)
    return starting, exact


def _budget(run: Run, denoiser: nn.Module, found: Mapping[str, Calibrated]) -> int:
    """Parameters of a style's factors, on average."""
    styles = run.recipe.styles
    if styles.num_bytes is None:
        assert styles.rank is not None
        return budget_of_rank(denoiser, styles.rank)
    offsets = sum(offset.numel() for one in found.values() for offset in one.offsets.values())
    text = sum(adapter.num_parameters for of_style in run.text.values() for adapter in of_style.values())
    offsets = (offsets + text) // len(found)
    budget = styles.num_bytes // NUM_BYTES - offsets
    if budget <= 0:
        raise UserError(
            f"styles.size is {styles.size}, of which the differences of biases, norms and text encoders alone take "
            f"{told_bytes(NUM_BYTES * offsets)}; choose more."
        )
    return budget


def _told(name: str, one: Calibrated, adapter: Adapter, is_own: bool) -> str:
    """What a style comes to before training."""
    size = f"{told_bytes(NUM_BYTES * adapter.num_parameters)}"
    if is_own:
        return f"{name}: {size}, its teacher's own LoRA"
    points = ", ".join(f"{told_bytes(NUM_BYTES * count)} {error:.2g}" for count, error in one.curve)
    return f"{name}: {size}; score error before training by size: {points}"


def _calibration_files(run: Run) -> dict[str, Path]:
    stems = file_stems(run.new_styles)
    return {
        name: run.folder / CALIBRATION / f"{stem}.safetensors" for name, stem in zip(run.new_styles, stems, strict=True)
    }


def _calibrate_share(run: Run, denoiser: nn.Module, prompts: StylePrompts, paths: Mapping[str, Path]) -> None:
    """Calibrate this process's share of the styles, as far as that has not been done."""
    accelerator, recipe = run.accelerator, run.recipe
    denoiser.to(accelerator.device)
    for index in range(accelerator.process_index, len(recipe.teachers), accelerator.num_processes):
        name = recipe.teachers[index].name
        if paths[name].is_file():
            continue
        roles = [role_of(recipe, run.plan, index, run.text)]
        groups = [Group(0, range(recipe.styles.samples), 1 / recipe.styles.samples)]
        batches = run.new_batches([name], roles)(
            groups=groups,
            caption_dropout=recipe.training.caption_dropout,
            seed=(recipe.seed + 1) * _CALIBRATED % 2**32,
        )

        reach = run.plan.reach.get(index)

        def samples(batches: Batches = batches, reach: Reach | None = reach) -> Iterator[Sample]:
            for batch in batches.of_step(0):
                asked = batch.timesteps
                if reach is not None:
                    asked = timesteps_of_equal_power(batch.levels, reach.alphas_cumprod.to(asked.device))
                yield Sample(batch.x_t, asked, batch.parts[0].conditioning, batch.timesteps, batch.conditioning)

        opened = run.plan.subject.open(run.plan.teachers[index], name=f"teacher '{name}'")[0]
        teacher = freeze(opened).to(accelerator.device, memory_format=torch.channels_last)
        with _prompted(run, denoiser, prompts, name), accelerator.autocast():
            found = calibrate(
                teacher,
                denoiser,
                samples,
                seed=recipe.seed,
                max_rank=num_kept(recipe.styles),
                own=_own_factors(run, index),
            )
        write_calibrated(found, paths[name])
        del opened, teacher  # before the next one is opened
        free_memory(accelerator.device)
    denoiser.to("cpu")


def _own_factors(run: Run, index: int) -> dict[str, Factors]:
    """The factors of a teacher that is a LoRA on the very weights that are shared; none of any other."""
    recipe, teacher = run.recipe, run.recipe.teachers[index]
    if recipe.start != "base" or recipe.earlier is not None or teacher.model not in (None, recipe.base):
        return {}
    source = run.plan.teachers[index]
    denoiser, text = run.plan.family.denoiser.name, run.text.get(teacher.name, {})
    models = {one.name: getattr(run.base, one.name) for one in components_of(run.base)}
    changes = [
        (change, scale)
        for path, scale in source.loras
        for change in read_lora(path, models, run.plan.family, allow_pickle=source.allow_pickle)
    ]
    factors: dict[str, Factors] = {}
    for change, scale in changes:
        if change.parameter != "weight":  # what is no layer's weight is carried in full
            continue
        form = change.form
        if change.component in text and form.rank is not None and form.rank <= recipe.styles.text_rank:
            continue  # it has been carried whole
        # a text encoder that reads otherwise is to be learnt, and other forms to be decomposed
        if change.component != denoiser or not isinstance(form, LowRank) or change.magnitude is not None:
            return {}
        if form.up.flatten(1).shape[1] != len(form.down):
            return {}
        name = f"{change.module}.weight"
        shape = models[denoiser].get_parameter(name).shape
        one = Factors(form.up.float().flatten(1) * (scale * change.scaling), form.down.float().reshape(-1, *shape[1:]))
        both = [factors[name], one] if name in factors else [one]
        factors[name] = Factors(torch.cat([part.up for part in both], dim=1), torch.cat([part.down for part in both]))
    return factors


@contextmanager
def _prompted(run: Run, denoiser: nn.Module, prompts: StylePrompts, name: str) -> Iterator[None]:
    """Within the block, a model has a style's prompt, where styles have prompts, baked in: on it stands the adapter."""
    if not prompts.config.dim:
        yield
        return
    with torch.no_grad():
        term = prompts(style_weights(prompts.names, name))
    kept = KeptWeights()
    kept.fuse(denoiser, term_change(denoiser, term, run.plan.family.port))
    try:
        yield
    finally:
        kept.fuse(denoiser, NOTHING)


def stored(adapter: Adapter, is_own: bool = False) -> Adapter:
    """As it is written: in half precision, unless that would change a bit of what is the teacher's own."""
    half = adapter.to(torch.float16)
    if is_own and not all(torch.equal(a, b.float()) for a, b in zip(_tensors(adapter), _tensors(half), strict=True)):
        return adapter
    return half


def _tensors(adapter: Adapter) -> list[Tensor]:
    return [part for one in adapter.factors.values() for part in (one.up, one.down)] + [*adapter.offsets.values()]


def _of_style(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one style's own run."""
    (teacher,) = (teacher for teacher in recipe.teachers if teacher.name == name)
    training = recipe.training.model_copy(update={"steps": steps_of(recipe, teacher)})
    return recipe.model_copy(update={"training": training})


def steps_of(recipe: Recipe, teacher: Teacher) -> int:
    """How long a style is trained where each is by itself: a teacher of more weight gets as many more steps."""
    return max(1, round(recipe.training.steps * teacher.weight))


def style_folder(folder: Path, recipe: Recipe, name: str) -> Path:
    """The folder of a style's own run, in that of the merge."""
    names = [teacher.name for teacher in recipe.teachers]
    return folder / STYLE_RUNS / file_stems(names)[names.index(name)]


def _train(
    run: Run, recipe: Recipe, denoiser: nn.Module, prompts: StylePrompts, name: str, start: Adapter, before: int
) -> Adapter:
    """Train one style's adapter to the end of its own run.

    Args:
        recipe: of this run.
        denoiser: with the shared weights, where and as it computes.
        before: steps that other styles have taken.
    """
    accelerator, training = run.accelerator, recipe.training
    folder = style_folder(run.folder, recipe, name)
    done = _finished(folder / CHECKPOINTS, training.steps, start)
    if done is not None:
        return done
    with _prompted(run, denoiser, prompts, name):
        index = run.new_styles.index(name)
        roles = [role_of(recipe, run.plan, index, run.text)]
        new_batches = run.new_batches([name], roles)
        set_changes(denoiser, {})
        with accelerator.autocast():
            watch = run.new_watch(denoiser, new_batches, [1], [name])
        set_seed(recipe.seed)
        adversary = build_adversary(recipe, run.plan, run.base, accelerator.device, num_styles=1)
        student = AdaptedStudent(denoiser, {name: start})
        teacher = open_teacher(recipe, run.plan, index)
        teacher.denoiser.to(accelerator.device)
        if watch is not None:
            watch.ask({0: teacher})
        batches = new_batches(
            groups=share_batch(training.batch_size, [1.0], accelerator.num_processes, accelerator.process_index),
            caption_dropout=training.caption_dropout,
            seed=recipe.seed,
            adversarial=adversary is not None,
        )
        show = None if run.show is None else partial(_show, run, student, before)
        folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(
            accelerator,
            student,
            Imitation({0: teacher}, recipe.losses.feature, adversary),
            batches,
            recipe,
            folder,
            [name],
            adversary,
            watch,
            show,
            title=f"{name}, ",
            before=before,
        )
        trainer.train()
        with trainer.averaged():
            adapter = student.adapter(name).to("cpu")
        set_changes(denoiser, {})
    accelerator.free_memory()
    free_memory(accelerator.device)
    return adapter


def _finished(root: Path, steps: int, start: Adapter) -> Adapter | None:
    """The adapter of a style whose own run has ended; None of another."""
    newest = newest_checkpoint(root)
    if newest is None or step_of(newest) != steps:
        return None
    return adapters_at(load_checkpoint(newest), [start])[0]


def adapters_at(checkpoint: Checkpoint, starting: Sequence[Adapter]) -> list[Adapter]:
    """The adapters that a checkpoint holds, their averages where it has these.

    Args:
        starting: of the same shapes, in the checkpoint's order.
    """
    state = {**checkpoint.tensors[STUDENT], **checkpoint.tensors.get("ema", {})}
    found = []
    for i, start in enumerate(starting):
        prefix, trained = f"adapters.{i}.", TrainedAdapter(start)
        own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        trained.load_state_dict(own)
        found.append(trained.frozen())
    return found


@torch.no_grad()
def _show(run: Run, student: AdaptedStudent, before: int, step: int) -> None:
    """Paint samples in the styles that are trained."""
    assert run.show is not None
    painter = copy.copy(run.base)
    twin = twin_of(student.unet)
    set_changes(twin, {})
    set_denoiser(painter, twin)
    prompts = StylePrompts(student.names, 0)
    prompts.adapters = {name: student.adapter(name) for name in student.names}
    add_styles(painter, prompts)
    run.show(painter, student.names, before + step)


def _train_all(run: Run, denoiser: nn.Module, prompts: StylePrompts, starting: Mapping[str, Adapter]) -> None:
    """Train the shared weights and all adapters together; the pipeline has them in the end."""
    recipe, accelerator = run.recipe, run.accelerator
    styles = list(starting)
    roles = roles_of(recipe, run.plan, styles, run.text)
    new_batches = run.new_batches(styles, roles)
    denoiser.to(accelerator.device)
    watch = run.new_watch(denoiser, new_batches, [1] * len(styles), styles)
    set_seed(recipe.seed)
    adversary = build_adversary(recipe, run.plan, run.base, accelerator.device, num_styles=len(styles))
    student = AdaptedStudent(denoiser, starting, train_shared=True)
    groups = share_batch(
        recipe.training.batch_size,
        [role.share for role in roles],
        accelerator.num_processes,
        accelerator.process_index,
    )
    teachers = open_teachers(recipe, run.plan, groups, accelerator.device)
    if watch is not None:
        watch.ask(teachers)
    batches = new_batches(
        groups=groups,
        caption_dropout=recipe.training.caption_dropout,
        seed=recipe.seed,
        adversarial=adversary is not None,
    )
    show = None if run.show is None else partial(_show, run, student, 0)
    lesson = Imitation(teachers, recipe.losses.feature, adversary)
    trainer = Trainer(accelerator, student, lesson, batches, recipe, run.folder, styles, adversary, watch, show)
    trainer.train()
    with trainer.averaged():
        set_changes(denoiser, {})
        prompts.adapters = {name: stored(student.adapter(name).to("cpu")) for name in styles}
        denoiser.requires_grad_(False).to("cpu")
        on_main(lambda: run.save(None))
