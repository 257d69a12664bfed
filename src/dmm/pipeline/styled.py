"""Merged models as pipelines: load, choose styles, share between threads, save.

A pipeline from :func:`load_pipeline` is a stock diffusers pipeline whose denoiser takes style terms; the
current style is state of that denoiser, as adapters are.
"""

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from torch import Tensor

from dmm.errors import UserError
from dmm.families import denoiser_of, family_of, set_denoiser
from dmm.files.outputs import new_folder
from dmm.formats.completing import complete_folder
from dmm.formats.folder import known_parts
from dmm.formats.lora import fuse_lora, read_lora
from dmm.maths.mixes import Mix
from dmm.models.adapting import Adaptation, mixed_adapter, twin_of
from dmm.models.authors import is_authors, open_authors, read_authors_styles
from dmm.models.side_car import read_side_car, write_side_car
from dmm.models.style_names import STYLES_FOLDER
from dmm.models.styles import (
    Provenance,
    StyledLinear,
    StylePrompts,
    attach_styles,
    bake,
    detach_styles,
    styled_port,
)
from dmm.models.teachers import ModelSource, locate, open_pipeline
from dmm.pipeline.choosing import adapt, choose, style_term_of, temporarily, uncompiled
from dmm.pipeline.reading import attach_reading, give_stock_reading, read_in, reading_restored, share_reading
from dmm.pipeline.style_schedule import StyleSchedule, check_style


def load_pipeline(
    path_or_hub_id: str | Path,
    *,
    config: str | Path | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> DiffusionPipeline:
    """Load a merged model; no style is set.

    Args:
        path_or_hub_id: what :func:`save_pipeline` wrote; or a merge in the layout that DMM's authors released, a folder
            or a single file, whose styles are named "0", "1" and so on where it names none.
        config: the pipeline folder whose configs and tokenizer a single file follows, where it does not say.
        torch_dtype: of the weights in memory, whatever their dtype on disk.
        device: where to put them; by default they stay on the CPU.
    Raises: UserError: a stock model, which has no styles; or whatever is wrong with the files.
    """
    path = locate(ModelSource(path_or_hub_id))
    style_prompts = read_styles(path)
    if style_prompts is None:
        raise UserError(
            f"{path_or_hub_id} has no {STYLES_FOLDER}/ folder, so it is a stock model without styles. Open it with "
            "diffusers, or paint with `dmm generate` without --style."
        )
    source = ModelSource(path, config=None if config is None else Path(config))
    pipe = open_styled(source, style_prompts, torch_dtype=torch_dtype)
    return pipe if device is None else pipe.to(device)


def read_styles(path: Path, *, allow_pickle: bool = False) -> StylePrompts | None:
    """Read the style prompts of a model on disk, of our layout or the authors'; None of a stock model.

    Raises: UserError: a file is missing, damaged or does not fit the others.
    """
    if is_authors(path, allow_pickle=allow_pickle):
        return read_authors_styles(path, allow_pickle=allow_pickle)
    return read_side_car(path)


def open_styled(
    source: ModelSource, style_prompts: StylePrompts, *, torch_dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """Open a merged model on disk with the styles that :func:`read_styles` found there; none is set.

    Raises: UserError: something is wrong with the files.
    """
    path = locate(source)
    if is_authors(path, allow_pickle=source.allow_pickle):
        pipe = open_authors(path, config=source.config, torch_dtype=torch_dtype, allow_pickle=source.allow_pickle)
        family = family_of(pipe)
        models = {component.name: getattr(pipe, component.name) for component in family.components}
        loras = [
            (read_lora(lora, models, family, allow_pickle=source.allow_pickle), scale) for lora, scale in source.loras
        ]
        for lora, scale in loras:
            fuse_lora(pipe, lora, scale)
    else:
        pipe = open_pipeline(source, torch_dtype=torch_dtype)
    add_styles(pipe, style_prompts)
    return pipe


def add_styles(pipe: Any, style_prompts: StylePrompts) -> None:
    """Make a stock pipeline one whose styles :func:`set_style` chooses; none is set.

    Raises: UserError: the style prompts belong to a model of another width.
    """
    denoiser = denoiser_of(pipe)
    attach_styles(denoiser, style_prompts, family_of(pipe).port)
    attach_reading(pipe, style_prompts)
    _warn_when_saved(denoiser)


def style_names(pipe: Any) -> list[str]:
    """The styles of a pipeline, in the order of the codebook.

    Raises: UserError: it has none.
    """
    return style_prompts_of(pipe).names


def set_style(pipe: Any, style: Mix | Sequence[Mix | None] | None) -> None:
    """Choose what a merged pipeline paints in, until the next call.

    Prompts are read in the style, too, where its teacher had a text encoder of its own: choose before they are.

    Args:
        pipe: from :func:`load_pipeline`, or made of such a one by diffusers' ``from_pipe``, which shares its style.
        style: the name of one; a mix, names with weights that sum to 1; a list of these, one for each image (prompts
            x images per prompt, in the pipeline's order: p0, p0, p1, p1), None for an image without; or None for none.
    Raises: UserError: the pipeline has no styles, there is none of that name, weights do not sum to 1, the list is
        empty, or it is something else. A list that does not fit the batch is a ``ValueError`` once it is painted; and
        so are styles with text encoders of their own for several images of one prompt, which is read once.
    """
    port = _port(pipe)  # a stock pipeline is told
    choose(denoiser_of(pipe), style)
    read_in(pipe, port.style_prompts, style)
    port.guided = _guidance_of(pipe)


@contextmanager
def temporary_style(pipe: Any, style: Mix | Sequence[Mix | None] | None) -> Iterator[None]:
    """:func:`set_style` for the length of a block; the style that was set before is set again after it."""
    port = _port(pipe)
    prompts = port.style_prompts
    with reading_restored(pipe, prompts), temporarily(denoiser_of(pipe), style):
        read_in(pipe, prompts, style)
        port.guided = _guidance_of(pipe)
        yield


@contextmanager
def style_over_time(
    pipe: Any, schedule: StyleSchedule | Sequence[StyleSchedule | Mix | None]
) -> Iterator[Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]]:
    """A ``callback_on_step_end`` that changes the style while a run goes on.

    ::

        schedule = dmm.StyleSchedule([(0, 0.4, "ink"), (0.4, 1, "photo")])
        with dmm.style_over_time(pipe, schedule) as callback:
            pipe("a red cat", callback_on_step_end=callback)

    A prompt is read once, before the first step, and so by the text encoder of the style that a run begins in.

    The style that was set before is set again after the block. Within it the pipeline, or one made of it by
    ``from_pipe``, may run several times.

    Args:
        schedule: of all images, or one for each image, as a list for :func:`set_style`; a mix in it does not change.
    Raises: UserError: the pipeline has no styles, there is none of that name, or weights do not sum to 1.
    """
    names = style_names(pipe)
    one_for_all = isinstance(schedule, StyleSchedule)
    each: Sequence[StyleSchedule | Mix | None] = [schedule] if isinstance(schedule, StyleSchedule) else schedule
    for one in each:
        check_style(names, one)

    def style_at(fraction: float) -> Mix | Sequence[Mix | None] | None:
        styles = [one.at(fraction) if isinstance(one, StyleSchedule) else one for one in each]
        return styles[0] if one_for_all else styles

    current = style_at(0)

    def on_step_end(running: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal current
        num_steps = running.num_timesteps
        # what is set now is painted next; after the last step that is the first step of another run
        coming = style_at((step + 1) % num_steps / num_steps)
        if coming != current:
            choose(denoiser_of(pipe), coming)
            _port(pipe).guided = _guidance_of(pipe)
            current = coming
        return tensors

    with temporary_style(pipe, current):
        yield on_step_end


def share(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A second pipeline on the same weights, with its own style and scheduler: one for each thread.

    It begins in the style that ``pipe`` has. What is done to the weights (``.to``, LoRAs) is done to both. Where styles
    have adapters, these run beside the weights from then on, in both, and a LoRA that is loaded later is one's own.

    Args:
        pipe: on the device and in the dtype that it shall keep. The second one's denoiser is not compiled.
    Raises: UserError: the pipeline has no styles, or is offloaded, which binds a denoiser to its pipeline.
    """
    denoiser = denoiser_of(pipe)
    if any("forward" in vars(module) for module in (uncompiled(denoiser), _port(pipe))):
        # what offloads puts it there, bound to this very module
        raise UserError("A pipeline cannot be shared once it is offloaded: share it first.")
    prompts, adaptation = style_prompts_of(pipe), _port(pipe).adaptation
    if prompts.adapters:
        adaptation.share(uncompiled(denoiser), prompts.names, prompts.adapters)
    second = copy.copy(pipe)  # from_pipe would cast the shared weights to float32
    twin = _twin(denoiser)
    set_denoiser(second, twin)
    _port(second).adaptation = Adaptation(shared=True)
    adapt(denoiser_of(second), adaptation.chosen)
    share_reading(pipe, second, prompts)
    _warn_when_saved(twin)
    second.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    for tokenizer in family_of(pipe).tokenizers:  # their padding is state that two threads may not set at once
        setattr(second, tokenizer, copy.deepcopy(getattr(pipe, tokenizer)))
    return second


def save_pipeline(
    pipe: DiffusionPipeline,
    folder: str | Path,
    *,
    provenance: Sequence[Provenance] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a merged pipeline, styles and all, whole or not at all.

    The folder is a stock one with ``styles/`` in it: diffusers opens it, and paints the style-less average.

    Args:
        provenance: of every style, in the order of :func:`style_names`; by default what the pipeline was loaded with.
        overwrite: replace files of the same name in a folder that is not empty.
    Raises: UserError: the pipeline has no styles; the folder is not empty, or cannot be written.
    """
    prompts = style_prompts_of(pipe)
    if provenance is not None:
        if [one.name for one in provenance] != prompts.names:
            raise ValueError(
                f"The styles are {prompts.names}, the provenance is of {[one.name for one in provenance]}."
            )
        prompts.provenance = provenance
    with new_folder(Path(folder), overwrite=overwrite, parts=known_parts()) as temporary, told_of_full_disk(folder):
        write_stock_folder(stock_twin(pipe), temporary)
        write_side_car(prompts, temporary)


def stock_twin(pipe: DiffusionPipeline, style: Mix | None = None) -> DiffusionPipeline:
    """A stock pipeline that shares the weights of a merged one and paints one style of it, with no code of ours.

    Args:
        style: or mix, which is baked into what weights the two do not share: one bias, or those that adapters change;
            None for the style-less model.
    Raises: UserError: the pipeline has no styles, there is none of that name, or weights do not sum to 1.
    """
    prompts = style_prompts_of(pipe)
    term = style_term(pipe, style) if style is not None and prompts.config.dim else None
    twin = copy.copy(pipe)
    denoiser = _twin(denoiser_of(pipe))
    if prompts.adapters:
        mixed = mixed_adapter(prompts.names, prompts.adapters, style)
        _port(pipe).adaptation.give_own_weights(denoiser, mixed)
        give_stock_reading(pipe, twin, mixed)
    detach_styles(denoiser)
    if term is not None:
        port = family_of(pipe).port
        denoiser.set_submodule(port, copy.deepcopy(denoiser.get_submodule(port)))
        bake(denoiser, term, port)
    set_denoiser(twin, denoiser)
    return twin


def write_stock_folder(pipe: DiffusionPipeline, folder: Path) -> None:
    """Fill a folder with a stock pipeline, such that other tools and plain diffusers open it, in half precision too."""
    pipe.save_pretrained(folder)
    complete_folder(folder)


@contextmanager
def told_of_full_disk(output: str | Path) -> Iterator[None]:
    """Within the block, that weights could not be written is a :class:`UserError`."""
    try:
        yield
    except SafetensorError as error:  # how a full disk is told by what writes weights
        raise UserError(f"'{output}' could not be written: {error}.") from error


def style_prompts_of(pipe: Any) -> StylePrompts:
    """The side-car of a merged pipeline.

    Raises: UserError: it has none.
    """
    return _port(pipe).style_prompts


@torch.no_grad()
def style_term(pipe: Any, style: Mix) -> Tensor:
    """What a style or mix adds to the embedding of the timestep, whatever style is set; (D,), float32.

    Raises: UserError: the pipeline has no styles, there is none of that name, or weights do not sum to 1.
    """
    return style_term_of(style_prompts_of(pipe), style)


def _port(pipe: Any) -> StyledLinear:
    port = styled_port(denoiser_of(pipe))
    if port is None:
        raise UserError("This pipeline has no styles: it is a stock model. Load a merged one with dmm.load_pipeline.")
    return port


def _guidance_of(pipe: Any) -> Callable[[], bool]:
    """What tells whether a pipeline doubles its batch now, as pipelines of UNets do in every guided step."""
    if family_of(pipe).is_flow:  # some of these guide in passes of their own, or not in every step
        return bool
    running = weakref.ref(pipe)
    # a pipeline that has not run yet does not know
    return lambda: bool(getattr(running(), "do_classifier_free_guidance", False))


def _twin(denoiser: Any) -> ModelMixin:
    """A denoiser on the same weights; all its modules but those that lead to the styles' port are the same ones, too.

    Where styles have adapters every module is its own: that is where these run.
    """
    original = uncompiled(denoiser)
    path, port = next((name, one) for name, one in original.named_modules() if isinstance(one, StyledLinear))
    if port.style_prompts.adapters:
        twin = twin_of(original)
    else:
        twin = own = _own(original)
        for name in path.split("."):
            own._modules[name] = _own(own._modules[name])
            own = own._modules[name]
    vars(twin).pop("save_pretrained", None)  # bound to the first one
    return twin


def _own(module: Any) -> Any:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)  # copy.copy leaves both with one dict
    return copied


def _warn_when_saved(denoiser: Any) -> None:
    # On the instance: a subclass would be saved under its own name. A bound method, which deepcopy binds to the copy.
    denoiser.save_pretrained = MethodType(_save_pretrained, denoiser)


@functools.wraps(ModelMixin.save_pretrained)
def _save_pretrained(denoiser: ModelMixin, *args: Any, **kwargs: Any) -> None:
    warnings.warn(
        "save_pretrained writes the style-less average of this merged model, without its styles; "
        "dmm.save_pipeline(pipe, folder) writes both.",
        stacklevel=2,
    )
    type(denoiser).save_pretrained(denoiser, *args, **kwargs)
