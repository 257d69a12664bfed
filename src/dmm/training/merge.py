"""A merge from its recipe to its result: check, open, encode, train, save.

One folder holds a run and what comes of it::

    merged/recipe.yaml         the recipe with all it was resolved to
           log.jsonl           loss curves
           checkpoints/        what --resume goes on from
           samples/            grids of pictures, by step
           trackers/           what trackers write to disk
           model_index.json    the result: a stock pipeline ...
           unet/ vae/ ...
           styles/             ... and its styles

           first-stage/        where the recipe has a second stage: all of this, of the first

Without ``model_index.json`` nothing takes the folder for a pipeline. It comes last, in one rename, so that the
result appears whole or not at all.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, set_seed

from dmm.data import TrainingData
from dmm.errors import UserError
from dmm.families import FAMILIES, family_of
from dmm.files.outputs import check_folder
from dmm.files.prompts import read_prompts
from dmm.files.runs import (
    CALIBRATION,
    CHECKPOINTS,
    FIRST_STAGE,
    INDEX,
    LOG,
    NET_INDEX,
    RECIPE,
    SAMPLES,
    STYLE_RUNS,
    UNTRAINED,
    check_new,
    checkpoints,
    has_result,
    step_of,
)
from dmm.formats.schedules import process_of
from dmm.maths.sharing import is_uneven, share_batch
from dmm.models.side_car import read_side_car
from dmm.models.style_names import STYLES_FOLDER, read_style_names
from dmm.models.teachers import open_pipeline
from dmm.recipes.parts import MAX_SEED
from dmm.recipes.recipe import Recipe, load_recipe, save_recipe
from dmm.recipes.stages import first_stage, second_stage
from dmm.recipes.training import Timesteps
from dmm.training.adapting import Run as AdapterRun
from dmm.training.adapting import adapt, steps_of, style_folder
from dmm.training.batches import Batches, Role
from dmm.training.building import build_adversary, build_student, open_teachers, roles_of
from dmm.training.checkpoint import newest_checkpoint
from dmm.training.controls import check_controls, measure_residuals
from dmm.training.distill import Imitation
from dmm.training.machine import check_space
from dmm.training.merge_costs import disk_parts
from dmm.training.merge_plan import Plan
from dmm.training.outlook import Outlook
from dmm.training.picture_sizes import with_size
from dmm.training.preflight import check_merge
from dmm.training.preparing import Terms, prepare_data_of, style_terms
from dmm.training.processes import claimed_by_main, join_processes, on_all, on_main
from dmm.training.reading import text_of_styles
from dmm.training.run_folder import check_same, flat, put_in_place, remove
from dmm.training.samples import NUM_PROMPTS, Rows, paint_teachers, show
from dmm.training.sources import open_source
from dmm.training.subject import Controls
from dmm.training.trainer import Trainer
from dmm.training.watch import Watch, watched_groups

_TRACKERS = "trackers"
_RESULT = "result"
_WRITTEN = (
    *(INDEX, RECIPE, LOG, CHECKPOINTS, SAMPLES, _TRACKERS, STYLES_FOLDER, CALIBRATION, UNTRAINED, STYLE_RUNS),
    *dict.fromkeys(component.name for family in FAMILIES.values() for component in family.components),
    "scheduler",
    *dict.fromkeys(tokenizer for family in FAMILIES.values() for tokenizer in family.tokenizers),
    NET_INDEX,
    *(f"{one.controlnet.weights_name}.safetensors" for one in FAMILIES.values() if one.controlnet),
)
# of a recipe, what a run may not change once it has begun
_BINDING = (
    *("kind", "base", "config", "start", "earlier", "teachers", "data", "size", "buckets", "frame", "styles", "seed"),
)
_WATCHED = 0x9E3779B9  # a factor that takes seeds far away from those that people choose

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """What a merge has come to.

    Attributes:
        styles: that it paints in.
        was_finished: the run had ended before, and nothing was done.
        seconds: that it took.
        is_control: whether it is a ControlNet, whose styles are controls.
    """

    folder: Path
    styles: list[str]
    was_finished: bool
    seconds: float
    is_control: bool


def merge(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    tell: Callable[[Outlook], object] | None = None,
) -> Merged:
    """Distil a recipe's teachers into one student, and save it as a pipeline.

    Called in every process of a run; all prepare data, and the main one saves. Nothing is written before training
    begins, but encoded data to the user's cache.

    Args:
        folder: of the run and its result.
        resume: go on with the run in ``folder``, or begin one where there is none.
        overwrite: remove what an earlier merge has written there, once everything is ready for the new one.
        device: where to run, see :func:`dmm.training.processes.join_processes`.
        tell: called on the main process with what will be done, stage by stage, once all of it is checked.
    Raises: UserError: something is wrong with the recipe, its models, its data or the folder, or another process is
        writing to that; Stopped: SIGINT or SIGTERM came, and the run is saved.
    """
    start = time.monotonic()
    state = join_processes(device)
    with claimed_by_main(folder):
        if not resume:
            on_main(lambda: check_new(folder, overwrite=overwrite))
        if recipe.finetune is not None:  # the second stage's check comes after the first stage's training
            prompts = recipe.finetune.synthesize.prompts
            on_main(lambda: read_prompts(prompts))
        unsized = recipe
        recipe = on_main(lambda: with_size(unsized))
        was_finished = []
        for stage, place in _stages(recipe, folder):
            check = partial(_check, stage, place, state, resume, overwrite, tell)
            plan = on_main(check)
            was_finished.append(plan is None)
            if plan is not None:
                try:
                    _run(stage, plan, place, resume=resume)
                finally:  # so that a second merge in this process may have another precision
                    AcceleratorState._reset_state()
        style_prompts = on_main(lambda: read_side_car(folder))
        assert style_prompts is not None
    return Merged(
        folder,
        style_prompts.names,
        was_finished=all(was_finished),
        seconds=time.monotonic() - start,
        is_control=recipe.kind == "controlnet",
    )


def _stages(recipe: Recipe, folder: Path) -> list[tuple[Recipe, Path]]:
    """A recipe as recipes of one stage each, and where each is run."""
    second = second_stage(recipe)
    if second is None:
        return [(recipe, folder)]
    # of another seed, or the second stage would draw the first one's noise again
    seed = (recipe.seed + 1) % (MAX_SEED + 1)
    second = second.model_copy(update={"start": str((folder / FIRST_STAGE).resolve()), "seed": seed})
    return [(first_stage(recipe), folder / FIRST_STAGE), (second, folder)]


def _run(recipe: Recipe, plan: Plan, folder: Path, *, resume: bool) -> None:
    training = recipe.training
    accelerator = Accelerator(
        mixed_precision="no" if training.precision == "fp32" else training.precision,
        log_with=list(recipe.logging.trackers) or None,
        project_dir=folder / _TRACKERS,
        # a cache of the weights in half precision would take as much as a teacher, and nothing reads it twice
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    styles = list(plan.styles)
    roles = roles_of(recipe, plan, styles)
    if is_uneven(len(roles), accelerator.num_processes) and accelerator.is_main_process:
        _logger.warning(
            "%d teachers on %d processes: some processes have more to do than others, which wait for them.",
            len(roles),
            accelerator.num_processes,
        )
    base = open_pipeline(plan.base, name="base")
    # made once: what was sent to other processes lies otherwise in memory, and sums may round otherwise there; what
    # they paint is found by these bits
    terms = on_main(lambda: style_terms(plan))
    text = on_main(lambda: text_of_styles(recipe, plan, base))
    data, captions = on_all(lambda: prepare_data_of(recipe, plan, base, terms, text, accelerator))
    prompts = recipe.logging.sample_prompts or tuple(dict.fromkeys(captions))[:NUM_PROMPTS]
    by_teachers = on_all(lambda: _paint_teachers(recipe, plan, terms, base, prompts, accelerator))
    show_step = partial(_show, recipe, plan, prompts, by_teachers, folder, accelerator.device)
    batches_of = partial(_batches_of, recipe, data, base, accelerator)
    if isinstance(plan.subject, Controls):
        measure_residuals(recipe, plan, plan.subject, base, batches_of(styles, roles), accelerator)
    if recipe.styles.has_adapters:
        _begin_all(recipe, folder, accelerator, resume=resume)
        watch_of = partial(_build_watch, recipe, plan, accelerator)
        shown = show_step if recipe.sample_interval else None
        save = partial(_save, base, plan, folder)
        adapt(AdapterRun(recipe, plan, folder, accelerator, base, text, batches_of, watch_of, shown, save))
        _finish_trackers(accelerator)
        return
    new_batches = batches_of(styles, roles)
    # asks the base, which then becomes the student
    num_styles = [len(role.styles) for role in roles]
    watch = _build_watch(recipe, plan, accelerator, plan.subject.of(base), new_batches, num_styles, styles)
    set_seed(recipe.seed)
    adversary = build_adversary(recipe, plan, base, accelerator.device, num_styles=len(styles))
    student = build_student(recipe, plan, base, average=accelerator.is_main_process)
    groups = share_batch(training.batch_size, [role.share for role in roles], *_places(accelerator))
    teachers = open_teachers(recipe, plan, groups, accelerator.device)
    if watch is not None:
        watch.ask(teachers)
    batches = new_batches(
        groups=groups,
        caption_dropout=training.caption_dropout,
        seed=recipe.seed,
        adversarial=adversary is not None,
    )

    plan.subject.put(base, student.unet)
    trainer = Trainer(
        accelerator,
        student,
        Imitation(teachers, recipe.losses.feature, adversary),
        batches,
        recipe,
        folder,
        styles,
        adversary,
        watch,
        partial(show_step, base, styles) if recipe.sample_interval else None,
    )
    if resume:
        on_all(trainer.resume)  # every check comes before the first write
    _begin_all(recipe, folder, accelerator, resume=resume)
    trainer.train()
    with trainer.averaged():
        on_main(lambda: _save(base, plan, folder, None))
    _finish_trackers(accelerator)


def _begin_all(recipe: Recipe, folder: Path, accelerator: Accelerator, *, resume: bool) -> None:
    on_main(lambda: _begin(recipe, folder, resume=resume))
    if recipe.logging.trackers:
        accelerator.init_trackers("dmm", flat(recipe.model_dump(mode="json")))


def _finish_trackers(accelerator: Accelerator) -> None:
    for tracker in accelerator.trackers:  # end_training would part the processes, and another stage may come
        tracker.finish()


def _show(
    recipe: Recipe,
    plan: Plan,
    prompts: Sequence[str],
    by_teachers: Rows,
    folder: Path,
    device: torch.device,
    pipeline: Any,
    styles: list[str],
    step: int,
) -> None:
    """Samples in some of the styles, beside what their teachers painted."""
    beside = [[row[plan.styles.index(style)] for style in styles] for row in by_teachers]
    show(pipeline, recipe, plan.size, styles, prompts, beside, folder, device, step)


def _paint_teachers(
    recipe: Recipe, plan: Plan, terms: Terms, base: Any, prompts: Sequence[str], accelerator: Accelerator
) -> Rows:
    """What the samples show beside the student, in the process that shows them."""
    if not recipe.sample_interval or not accelerator.is_main_process:
        return []
    return paint_teachers(recipe, plan, terms, base, prompts, accelerator.device)


def _places(accelerator: Accelerator) -> tuple[int, int]:
    """How many processes there are, and which of them this is."""
    return accelerator.num_processes, accelerator.process_index


def _batches_of(
    recipe: Recipe,
    data: TrainingData,
    base: Any,
    accelerator: Accelerator,
    styles: Sequence[str],
    roles: Sequence[Role],
) -> Callable[..., Batches]:
    """What makes batches of the training data; it lacks whose, and their randomness."""
    painted, drawn = recipe.data.synthesize, recipe.training.timesteps or Timesteps()
    config = base.scheduler.config
    return partial(
        Batches,
        data,
        styles,
        roles,
        process=process_of(config, family_of(base), density=drawn.density, shift=drawn.shift),
        micro_batch_size=recipe.training.micro_batch_size,
        device=accelerator.device,
        own=(painted.own, painted.student) if painted else (0.0, 0.0),
        noise_weighting=recipe.losses.noise_weighting,
    )


def _build_watch(
    recipe: Recipe,
    plan: Plan,
    accelerator: Accelerator,
    beside: torch.nn.Module,
    new_batches: Callable[..., Batches],
    num_styles: Sequence[int],
    styles: Sequence[str],
) -> Watch | None:
    """What measures the score error while the student trains, where the recipe wants it.

    Args:
        beside: the model that the student is measured beside, which is asked now.
        num_styles: of each teacher.
    """
    if not recipe.logging.score_error_every:
        return None
    groups = watched_groups(num_styles, *_places(accelerator))
    fixed = new_batches(groups=groups, caption_dropout=0.0, seed=(recipe.seed + 1) * _WATCHED % 2**32)
    return Watch(fixed, beside.to(accelerator.device), plan.prediction_type, list(styles))


def _check(
    recipe: Recipe,
    folder: Path,
    state: PartialState,
    resume: bool,
    overwrite: bool,
    tell: Callable[[Outlook], object] | None,
) -> Plan | None:
    """Everything that can be checked before anything large is loaded; None where the run has ended already."""
    is_run = (folder / RECIPE).is_file()
    held = [path.name for path in folder.iterdir() if path.name != FIRST_STAGE] if folder.is_dir() else []
    if (resume or overwrite) and not is_run and held:
        raise UserError(
            f"'{folder}' holds no {RECIPE}, so it is no merge to {'resume' if resume else 'overwrite'}. Name another "
            "output."
        )
    if resume and is_run:
        before = load_recipe(folder / RECIPE, may_be_gone=True)
        check_same(before, recipe, _BINDING, folder)
        if has_result(folder):
            _check_styles(recipe, folder)
            if before == recipe:
                return None
        _check_resumable(recipe, folder)
    else:
        check_folder(folder, overwrite=overwrite, besides=FIRST_STAGE)
    check = check_controls if recipe.kind == "controlnet" else check_merge
    plan = check(recipe, state.num_processes, state.device)
    source = open_source(recipe, plan.styles)
    check_space(folder, sum(disk_parts(plan.sizes, recipe).values()))
    if tell is not None:
        tell(Outlook(recipe, plan, source, folder, state.device, state.num_processes))
    return plan


def _check_styles(recipe: Recipe, folder: Path) -> None:
    """Refuse to take a model from which a style was removed, and which keeps its merge's recipe, for that merge."""
    earlier = read_style_names(recipe.earlier.model) if recipe.earlier else None
    names = read_style_names(str(folder)) or []
    gone = [name for name in (*(earlier or ()), *(teacher.name for teacher in recipe.teachers)) if name not in names]
    if gone:
        raise UserError(
            f"'{folder}' holds a model of the styles {', '.join(names)}: without {', '.join(gone)} it is not what the "
            "recipe makes, and a run cannot go on to that. Name another output, or add --overwrite in place of "
            "--resume to begin anew."
        )


def _check_resumable(recipe: Recipe, folder: Path) -> None:
    """Refuse to go on with a run from which a recipe cannot be reached: it would begin anew over its own result."""
    roots = {folder / CHECKPOINTS: recipe.training.steps}
    if recipe.styles.trained == "adapters":
        roots = {style_folder(folder, recipe, one.name) / CHECKPOINTS: steps_of(recipe, one) for one in recipe.teachers}
    for root, steps in roots.items():
        saved = checkpoints(root)
        trained = (step_of(saved[-1]) or 0) if saved else 0
        if trained > steps:
            raise UserError(
                f"The run in '{root.parent}' has trained {trained} steps already, more than the recipe's "
                f"training.steps of {steps}. Raise that, or name another output."
            )
    if has_result(folder) and all(newest_checkpoint(root) is None for root in roots):
        raise UserError(
            f"'{folder}' holds the result of a run whose checkpoints are gone, so that it cannot go on under a changed "
            f"recipe. To train on from the result, begin a new run with --set 'start={folder}' and another --output; "
            "to begin anew in its place, add --overwrite in place of --resume."
        )


def _begin(recipe: Recipe, folder: Path, *, resume: bool) -> None:
    """Make the folder that of this run: everything is ready for training."""
    if not resume:
        remove(folder, _WRITTEN)
    # while a run goes on, its folder is no pipeline; and what a killed one has left is swept
    remove(folder, (INDEX, NET_INDEX, _RESULT, *(path.name for path in folder.glob(f".{_RESULT}.*.tmp"))))
    (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, folder / RECIPE)


def _save(pipeline: Any, plan: Plan, folder: Path, stage: str | None) -> None:
    """Write the result, or into a folder of the run's what there is at a stage before, where that has not been done."""
    plan.subject.of(pipeline).to(memory_format=torch.contiguous_format)  # safetensors takes no other
    if stage is not None:
        if not (folder / stage).is_dir():
            plan.subject.save(pipeline, folder / stage, plan.provenance)
        return
    plan.subject.save(pipeline, folder / _RESULT, plan.provenance)
    put_in_place(folder, _RESULT, plan.subject.index)
    remove(folder, (UNTRAINED, CALIBRATION))  # which the result stands in for
