"""A few-step distillation from its recipe to its result: check, open, encode, train, save.

One folder holds a run and what comes of it::

    fast/acceleration/recipe.yaml       the recipe with all it was resolved to
                      log.jsonl         the loss curve
                      checkpoints/      what --resume goes on from
         model_index.json, unet/ ...    the result: a stock pipeline whose scheduler is LCM's ...
         styles/                        ... with the styles that the model had
         few_steps.json                 what it was distilled with
         recipe.yaml                    of the merge that it was, as its teachers' record
         fast.safetensors               of a rank, in place of all these: a LoRA for the model that was accelerated

The result comes last, and appears whole or not at all.
"""

import copy
import inspect
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, set_seed
from diffusers import LCMScheduler

from dmm.data import Synthesis, TrainingData, prepare_data
from dmm.data.rows import Place
from dmm.data.training import STUDENT, reader_in
from dmm.families import denoiser_of, set_denoiser, text_encoders_of
from dmm.files.few_steps import FILE, KEY, FewSteps
from dmm.files.outputs import check_folder, new_file
from dmm.files.runs import ACCELERATION, CHECKPOINTS, FAST, INDEX, LOG, RECIPE, check_new
from dmm.formats.folder import known_parts
from dmm.formats.tensors import check_finite, write_tensors
from dmm.maths.sharing import share_batch
from dmm.models.adapter_files import lora_tensors
from dmm.models.adapters import NOTHING
from dmm.models.few_step import FewStepStudent, add_told, new_fast, style_names_of
from dmm.models.teachers import freeze, open_pipeline
from dmm.models.text_adapters import reading_as
from dmm.models.unfused import set_changes
from dmm.pipeline.reading import reads_otherwise
from dmm.pipeline.styled import add_styles, save_pipeline, write_stock_folder
from dmm.recipes.accelerating import FewStepRecipe, load_few_step_recipe, save_few_step_recipe
from dmm.training.accelerating_checks import FewStepPlan, check_acceleration, describe_acceleration, open_data
from dmm.training.building import DTYPES
from dmm.training.few_step import Consistency
from dmm.training.paths import Paths
from dmm.training.preparing import free_memory, open_in_style
from dmm.training.processes import claimed_by_main, join_processes, on_all, on_main
from dmm.training.run_folder import check_same, flat, put_in_place, remove
from dmm.training.trainer import Trainer

_TRACKERS = "trackers"
_RESULT = "result"
# of a recipe, what a run may not change once it has begun
_BINDING = ("model", "method", "rank", "guidance", "skip", "data", "size", "seed")


@dataclass(frozen=True)
class Accelerated:
    """What a few-step distillation has come to.

    Attributes:
        result: the model's folder, or the LoRA's file.
        styles: of the model; none of a stock one.
        was_finished: the run had ended before, and nothing was done.
        seconds: that it took.
    """

    result: Path
    styles: list[str]
    few_steps: FewSteps
    was_finished: bool
    seconds: float


def accelerate(
    recipe: FewStepRecipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    tell: Callable[[str], object] | None = None,
) -> Accelerated:
    """Distil a model into one that paints in a few steps, and save it.

    Called in every process of a run; all prepare data, and the main one saves. Nothing is written before training
    begins, but encoded data to the user's cache.

    Args:
        folder: of the run and its result.
        resume: go on with the run in ``folder``, or begin one where there is none.
        overwrite: remove what an earlier run has written there, once everything is ready for the new one.
        device: where to run, see :func:`dmm.training.processes.join_processes`.
        tell: called on the main process with what will be done, once all of it is checked.
    Raises: UserError: something is wrong with the recipe, the model, its data or the folder, or another process is
        writing to that; Stopped: SIGINT or SIGTERM came, and the run is saved.
    """
    start = time.monotonic()
    state = join_processes(device)
    with claimed_by_main(folder):
        if not resume:
            on_main(lambda: check_new(folder, overwrite=overwrite))
        plan, was_finished = on_main(partial(_check, recipe, folder, state, resume, overwrite, tell))
        few_steps = plan.few_steps(recipe)
        if not was_finished:
            try:
                _run(recipe, plan, few_steps, folder, resume=resume)
            finally:  # so that a second run in this process may have another precision
                AcceleratorState._reset_state()
    styles = plan.style_prompts.names if plan.style_prompts else []
    result = folder / FAST if recipe.rank else folder
    return Accelerated(result, styles, few_steps, was_finished, time.monotonic() - start)


def _check(
    recipe: FewStepRecipe,
    folder: Path,
    state: PartialState,
    resume: bool,
    overwrite: bool,
    tell: Callable[[str], object] | None,
) -> tuple[FewStepPlan, bool]:
    """Everything that can be checked before anything large is loaded, and whether the run has ended already."""
    saved = folder / ACCELERATION / RECIPE
    if resume and saved.is_file():
        before = load_few_step_recipe(saved, may_be_gone=True)
        check_same(before, recipe, _BINDING, folder)
        is_finished = before == recipe and (folder / (FAST if recipe.rank else INDEX)).is_file()
    else:
        check_folder(folder, overwrite=overwrite)
        is_finished = False
    plan = check_acceleration(recipe, folder, state.num_processes, state.device)
    if not is_finished and tell is not None:
        tell(describe_acceleration(recipe, plan, folder, device=state.device, num_processes=state.num_processes))
    return plan, is_finished


def _run(recipe: FewStepRecipe, plan: FewStepPlan, few_steps: FewSteps, folder: Path, *, resume: bool) -> None:
    training, run = recipe.training, folder / ACCELERATION
    accelerator = Accelerator(
        mixed_precision="no" if training.precision == "fp32" else training.precision,
        log_with=list(recipe.logging.trackers) or None,
        project_dir=run / _TRACKERS,
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    base = open_pipeline(plan.model, name="model")
    data = on_all(lambda: _prepare(recipe, plan, base, accelerator))
    set_seed(recipe.seed)
    denoiser = denoiser_of(base).to(memory_format=torch.channels_last)
    fast = new_fast(denoiser, recipe.rank, recipe.seed) if recipe.rank else None
    dtype = DTYPES[training.precision]
    teacher = None
    if fast is None:
        frozen = copy.deepcopy(denoiser).to(accelerator.device, dtype)
        teacher = freeze(FewStepStudent(frozen, plan.style_prompts, plan.family))
        if recipe.draws_guidance:
            add_told(denoiser, plan.family)
    else:
        denoiser.to(accelerator.device, dtype)
    student = FewStepStudent(denoiser, plan.style_prompts, plan.family, fast=fast)
    styles = style_names_of(plan.style_prompts)
    shares = [1 / len(styles)] * len(styles)
    painted = recipe.data.synthesize
    batches = Paths(
        data,
        styles,
        readers=_readers(styles, plan),
        groups=share_batch(training.batch_size, shares, accelerator.num_processes, accelerator.process_index),
        style_by_style=student.has_adapters,
        alphas_cumprod=plan.alphas_cumprod,
        skip=plan.skip,
        draws_gamma=recipe.method == "splam",
        guidance=recipe.guidance,
        own=painted.own if painted else 0.0,
        caption_dropout=training.caption_dropout,
        micro_batch_size=training.micro_batch_size,
        seed=recipe.seed,
        device=accelerator.device,
    )
    lesson = Consistency(student, teacher or student, plan.prediction_type)
    trainer = Trainer(accelerator, student, lesson, batches, recipe, run, styles)
    if resume:
        on_all(trainer.resume)  # every check comes before the first write
    on_main(lambda: _begin(recipe, folder, resume=resume))
    if recipe.logging.trackers:
        accelerator.init_trackers("dmm", flat(recipe.model_dump(mode="json")))
    trainer.train()
    with trainer.averaged() if recipe.training.ema_decay else nullcontext():
        on_main(lambda: _save(student, base, plan, few_steps, folder))
    for tracker in accelerator.trackers:
        tracker.finish()


def _prepare(recipe: FewStepRecipe, plan: FewStepPlan, base: Any, accelerator: Accelerator) -> TrainingData:
    """The training data, this process's share of it made; ``base`` comes back to the CPU."""
    source, device = open_data(recipe, plan), accelerator.device
    readers = (base.vae, *text_encoders_of(base))
    for module in readers:
        module.to(device)
    prompts, openers = plan.style_prompts, {}
    if isinstance(source, Synthesis):
        for i, name in enumerate(style_names_of(prompts)):
            adapter = NOTHING if prompts is None else prompts.adapters.get(name, NOTHING)
            with torch.no_grad():
                term = torch.zeros(0) if prompts is None else prompts(torch.eye(len(prompts.names))[i])
            dtype = DTYPES[recipe.training.precision]
            openers[name] = partial(open_in_style, plan.model, "model", dtype, device, adapter, term)
    data = prepare_data(
        source,
        base,
        openers,
        size=plan.size,
        readers={
            reader: partial(reading_as, base, prompts.adapters[name])
            for name, reader in zip(prompts.names, _readers(prompts.names, plan), strict=True)
            if reader != STUDENT
        }
        if prompts
        else {},
        place=Place(accelerator.process_index, accelerator.num_processes),
        show_progress=accelerator.is_main_process,
    )
    for module in readers:
        module.to("cpu")
    free_memory(device)
    return data


def _readers(styles: Sequence[str], plan: FewStepPlan) -> list[str]:
    """By style, the name of the text encoder that the model reads by in it."""
    prompts = plan.style_prompts
    return [reader_in(name) if prompts and reads_otherwise(prompts, name) else STUDENT for name in styles]


def _begin(recipe: FewStepRecipe, folder: Path, *, resume: bool) -> None:
    """Make the folder that of this run: everything is ready for training."""
    run = folder / ACCELERATION
    if not resume:
        remove(run, (RECIPE, LOG, CHECKPOINTS, _TRACKERS, _RESULT))
    # while a run goes on, its folder is no model; and what a killed one has left is swept
    remove(folder, (INDEX, FAST, *known_parts(), RECIPE))
    remove(run, (_RESULT, *(path.name for path in run.glob(f".{_RESULT}.*.tmp"))))
    (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    save_few_step_recipe(recipe, run / RECIPE)


def _save(student: FewStepStudent, base: Any, plan: FewStepPlan, few_steps: FewSteps, folder: Path) -> None:
    """Write the result: the LoRA, or the model, of the weights that the student has now."""
    if student.fast is not None:
        _save_lora(student, plan, few_steps, folder / FAST)
        return
    denoiser = student.unet
    set_changes(denoiser, {})
    denoiser.to("cpu", memory_format=torch.contiguous_format)  # safetensors takes no other
    set_denoiser(base, denoiser)
    base.scheduler = _scheduler(base.scheduler.config, num_points=len(plan.alphas_cumprod) // plan.skip)
    result = folder / ACCELERATION / _RESULT
    if plan.style_prompts is not None:
        add_styles(base, plan.style_prompts)
        save_pipeline(base, result)
    else:
        write_stock_folder(base, result)
    (result / FILE).write_text(few_steps.written() + "\n", encoding="utf-8")
    recipe = plan.folder / RECIPE
    if recipe.is_file():
        shutil.copyfile(recipe, result / RECIPE)
    put_in_place(folder, f"{ACCELERATION}/{_RESULT}")


def _scheduler(config: Mapping[str, Any], *, num_points: int) -> LCMScheduler:
    """LCM's, on the model's noise schedule; without what the model's own says and this one would only warn of."""
    known = {name: value for name, value in config.items() if name in inspect.signature(LCMScheduler).parameters}
    return LCMScheduler(
        **{**known, "original_inference_steps": num_points, "timestep_spacing": "leading", "clip_sample": False}
    )


def _save_lora(student: FewStepStudent, plan: FewStepPlan, few_steps: FewSteps, path: Path) -> None:
    assert student.fast is not None
    tensors, _ = lora_tensors(student.fast.frozen(), plan.family.denoiser.name, plan.family)
    check_finite(tensors, "the LoRA")
    metadata = {
        "format": "pt",
        **plan.family.lora_metadata,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(few_steps.rank),
        "ss_network_alpha": str(float(few_steps.rank)),
        KEY: few_steps.written(),
    }
    with new_file(path, overwrite=True) as temporary:
        write_tensors(temporary, tensors, metadata)
