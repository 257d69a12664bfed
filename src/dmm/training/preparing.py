"""A merge's training data: which models are opened to paint and to read it, and where they do."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dmm.data import Synthesis, TrainingData, prepare_data
from dmm.data.rows import Place
from dmm.data.training import reader_in, student_in
from dmm.families import denoiser_of, family_of, text_encoders_of
from dmm.models.adapters import NOTHING, Adapter, KeptWeights
from dmm.models.styles import StylePrompts, bake
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.models.text_adapters import fuse_text, reading_as
from dmm.recipes.recipe import Recipe
from dmm.training.building import DTYPES
from dmm.training.merge_plan import Plan
from dmm.training.picture_sizes import buckets_of
from dmm.training.reading import Text
from dmm.training.sources import open_source, paints_earlier, paints_itself
from dmm.training.subject import Controls

THE_BASE = "/base"
"""Names the base as a painter; no style is named so."""

Terms = tuple[list[Tensor], list[Tensor]]
"""Of the styles of the earlier merge, and of the start, where they are merged models: (D,) each."""


def style_terms(plan: Plan) -> Terms:
    """What the merged models add to their time embedding for each of their styles."""
    return _terms_of(plan.earlier), _terms_of(plan.style_prompts)


@torch.no_grad()
def _terms_of(prompts: StylePrompts | None) -> list[Tensor]:
    return [] if prompts is None else [prompts(style) for style in torch.eye(len(prompts.names))]


def prepare_data_of(
    recipe: Recipe, plan: Plan, base: Any, terms: Terms, text: Text, accelerator: Accelerator
) -> tuple[TrainingData, Sequence[str]]:
    """The training data, this process's share of it made, and its captions.

    Args:
        base: the pipeline whose VAE and text encoder read; they come back to the CPU.
        text: what styles change of the text encoder.
    """
    source, device = open_source(recipe, plan.styles), accelerator.device
    readers = (base.vae, *text_encoders_of(base))
    for module in readers:
        module.to(device)
    data = prepare_data(
        source,
        base,
        _openers(recipe, plan, terms, device, paints=isinstance(source, Synthesis)),
        size=plan.size,
        buckets=buckets_of(recipe, plan.size),
        frame=None if recipe.buckets else plan.frame,
        clip_skips={teacher.name: teacher.clip_skip for teacher in recipe.teachers if teacher.clip_skip},
        conditions=plan.subject.conditions if isinstance(plan.subject, Controls) else None,
        readers={
            reader_in(name): partial(reading_as, base, Adapter({}, {}, of_style)) for name, of_style in text.items()
        },
        place=Place(accelerator.process_index, accelerator.num_processes),
        show_progress=accelerator.is_main_process,
    )
    # training needs none of them; the base's wait for the samples and the result
    for module in readers:
        module.to("cpu")
    free_memory(device)
    return data, source.prompts if isinstance(source, Synthesis) else source.captions


def painters_of(recipe: Recipe, plan: Plan, terms: Terms, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What opens who paints in each of the student's styles: the teachers, and the earlier merge in its own."""
    dtype = DTYPES[recipe.training.precision]

    def open_teacher(name: str, model: ModelSource) -> Any:
        return open_pipeline(model, torch_dtype=dtype, name=f"teacher '{name}'").to(device)

    earlier: dict[str, Callable[[], Any]] = {}
    if plan.earlier is not None:
        # what the earlier student paints in each of its styles stands in for its teachers
        open_earlier = partial(open_in_style, plan.base, "the earlier merge", dtype, device)
        adapters = plan.earlier.adapters
        earlier = {
            name: partial(open_earlier, adapters.get(name, NOTHING), term)
            for name, term in zip(plan.earlier.names, terms[0], strict=True)
        }
    return earlier | {
        teacher.name: partial(open_teacher, teacher.name, model)
        for teacher, model in zip(recipe.teachers, plan.teachers, strict=True)
    }


def _openers(
    recipe: Recipe, plan: Plan, terms: Terms, device: torch.device, *, paints: bool
) -> dict[str, Callable[[], Any]]:
    """What opens each model that paints or reads, by the name of what it makes.

    Args:
        paints: whether pictures are made; if not, teachers read captions only.
    """
    if recipe.kind == "controlnet":  # whose captions the base reads, and whose pictures it paints
        open_base = partial(_open_reader, "base", plan.base, device)
        return {THE_BASE: lambda: open_base().to(device)} if paints else {}
    if not paints:
        return {
            teacher.name: partial(_open_reader, teacher.name, model, device)
            for teacher, model in zip(recipe.teachers, plan.teachers, strict=True)
        }
    openers = painters_of(recipe, plan, terms, device)
    if not paints_earlier(recipe):
        openers = {teacher.name: openers[teacher.name] for teacher in recipe.teachers}
    if paints_itself(recipe):
        assert plan.start is not None
        assert plan.style_prompts is not None
        open_start = partial(open_in_style, plan.start, "start", DTYPES[recipe.training.precision], device)
        adapters = plan.style_prompts.adapters
        openers |= {
            student_in(name): partial(open_start, adapters.get(name, NOTHING), term)
            for name, term in zip(plan.styles, terms[1], strict=True)
        }
    return openers


def _open_reader(name: str, model: ModelSource, device: torch.device) -> Any:
    # reading captions is little work, and worth doing exactly
    pipeline = open_pipeline(model, torch_dtype=torch.float32, name=f"teacher '{name}'")
    for encoder in text_encoders_of(pipeline):
        encoder.to(device)
    return pipeline


def open_in_style(
    model: ModelSource, name: str, dtype: torch.dtype, device: torch.device, adapter: Adapter, term: Tensor
) -> Any:
    """Open a model with a style in its weights; its text encoders read in it, too.

    Args:
        name: see :func:`dmm.models.teachers.check_model`.
        adapter: of the style.
        term: of the style, (D,); empty where it has none.
    """
    pipeline = open_pipeline(model, torch_dtype=dtype, name=name)
    KeptWeights().fuse(denoiser_of(pipeline), adapter)
    fuse_text(pipeline, adapter)
    if len(term):
        bake(denoiser_of(pipeline), term, family_of(pipeline).port)
    return pipeline.to(device)


def free_memory(device: torch.device) -> None:
    """Give back what dropped tensors held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
