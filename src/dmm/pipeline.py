"""Merged models as pipelines: load, choose styles, share between threads, save.

A pipeline from :func:`load_pipeline` is a stock diffusers pipeline whose UNet takes style terms; the
current style is state of that UNet, as adapters are.
"""

import copy
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from torch.func import functional_call

from dmm.errors import UserError
from dmm.families import SD1
from dmm.formats.side_car import STYLES_FOLDER, read_side_car, write_side_car
from dmm.formats.tensors import read_tensors, write_tensors
from dmm.outputs import new_folder
from dmm.styles import (
    Mix,
    Provenance,
    StyledTimestepEmbedding,
    StylePrompts,
    attach_styles,
    detach_styles,
    style_weights,
    styled_embedding,
)
from dmm.teachers import ModelSource, locate, open_pipeline


def load_pipeline(
    path_or_hub_id: str | Path,
    *,
    torch_dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> StableDiffusionPipeline:
    """Load a merged model; no style is set.

    Args:
        path_or_hub_id: what :func:`save_pipeline` wrote.
        torch_dtype: of the weights in memory, whatever their dtype on disk.
        device: where to put them; by default they stay on the CPU.
    Raises: UserError: a stock model, which has no styles; or whatever is wrong with the files.
    """
    folder = locate(ModelSource(path_or_hub_id))
    style_prompts = read_side_car(folder)
    if style_prompts is None:
        raise UserError(
            f"{path_or_hub_id} has no {STYLES_FOLDER}/ folder, so it is a stock model without styles. Open it with "
            "diffusers, or paint with `dmm generate` without --style."
        )
    pipe = open_pipeline(ModelSource(folder), torch_dtype=torch_dtype)
    add_styles(pipe, style_prompts)
    return pipe if device is None else pipe.to(device)


def add_styles(pipe: Any, style_prompts: StylePrompts) -> None:
    """Make a stock pipeline one whose styles :func:`set_style` chooses; none is set.

    Raises: UserError: the style prompts belong to a model of another width.
    """
    attach_styles(pipe.unet, style_prompts, SD1.time_embedding)
    _warn_when_saved(pipe.unet)


def style_names(pipe: Any) -> list[str]:
    """The styles of a pipeline, in the order of the codebook.

    Raises: UserError: it has none.
    """
    return _embedding(pipe).style_prompts.names


@torch.no_grad()
def set_style(pipe: Any, style: Mix | Sequence[Mix | None] | None) -> None:
    """Choose what a merged pipeline paints in, until the next call.

    Args:
        pipe: from :func:`load_pipeline`, or made of such a one by diffusers' ``from_pipe``, which shares its style.
        style: the name of one; a mix, names with weights that sum to 1; a list of these, one for each image (prompts
            x images per prompt, in the pipeline's order: p0, p0, p1, p1), None for an image without; or None for none.
    Raises: UserError: the pipeline has no styles, there is none of that name, weights do not sum to 1, or the list is
        empty. A list that does not fit the batch is a ``ValueError`` once it is painted.
    """
    embedding = _embedding(pipe)
    prompts = embedding.style_prompts
    if style is None:
        embedding.term = None
        return
    if isinstance(style, str | Mapping):
        term = _term(prompts, style)
    elif style:
        term = torch.stack([_term(prompts, one) for one in style])
    else:
        raise UserError("A list of styles needs one style for each image; this one is empty.")
    # on the device of the style prompts, not of the UNet: weights that are offloaded may be on none
    embedding.term = term.to(pipe.unet.dtype)


@contextmanager
def temporary_style(pipe: Any, style: Mix | Sequence[Mix | None] | None) -> Iterator[None]:
    """:func:`set_style` for the length of a block; the style that was set before is set again after it."""
    embedding = _embedding(pipe)
    before = embedding.term
    set_style(pipe, style)
    try:
        yield
    finally:
        embedding.term = before


def share(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A second pipeline on the same weights, with its own style and scheduler: one for each thread.

    It begins in the style that ``pipe`` has. What is done to the weights (``.to``, LoRAs) is done to both.

    Args:
        pipe: on the device and in the dtype that it shall keep. The second one's UNet is not compiled.
    Raises: UserError: the pipeline has no styles, or is offloaded, which binds a UNet to its pipeline.
    """
    if any("forward" in vars(module) for module in (_uncompiled(pipe.unet), _embedding(pipe))):
        # what offloads puts it there, bound to this very module
        raise UserError("A pipeline cannot be shared once it is offloaded: share it first.")
    second = copy.copy(pipe)  # from_pipe would cast the shared weights to float32
    second.unet = _twin(pipe.unet)
    _warn_when_saved(second.unet)
    second.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    second.tokenizer = copy.deepcopy(pipe.tokenizer)  # its padding is state that two threads may not set at once
    return second


def save_pipeline(
    pipe: StableDiffusionPipeline,
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
    prompts = _embedding(pipe).style_prompts
    if provenance is not None:
        if [one.name for one in provenance] != prompts.names:
            raise ValueError(
                f"The styles are {prompts.names}, the provenance is of {[one.name for one in provenance]}."
            )
        prompts.provenance = provenance
    plain = copy.copy(pipe)
    plain.unet = _twin(pipe.unet)
    detach_styles(plain.unet, SD1.time_embedding)
    with new_folder(Path(folder), overwrite=overwrite) as temporary:
        try:
            plain.save_pretrained(temporary)
            _name_as_tools_do(temporary / "text_encoder" / "model.safetensors")
            write_side_car(prompts, temporary)
        except SafetensorError as error:  # how a full disk is told by what writes weights
            raise UserError(f"'{folder}' could not be written: {error}.") from error


def _embedding(pipe: Any) -> StyledTimestepEmbedding:
    embedding = styled_embedding(pipe.unet)
    if embedding is None:
        raise UserError("This pipeline has no styles: it is a stock model. Load a merged one with dmm.load_pipeline.")
    return embedding


def _term(prompts: StylePrompts, style: Mix | None) -> Tensor:
    """The style term in float32, whatever the dtype of the prompts; (D,)."""
    if style is None:  # an image without a style among others with one: adding 0 is skipping
        return prompts.embeddings.new_zeros(prompts.config.dim, dtype=torch.float32)
    parameters = {name: parameter.float() for name, parameter in prompts.named_parameters()}
    weights = style_weights(prompts.names, style).to(prompts.embeddings.device)
    term: Tensor = functional_call(prompts, parameters, weights)
    return term


def _twin(unet: Any) -> UNet2DConditionModel:
    """A UNet on the same modules, but for an embedding of time that is its own."""
    twin = copy.copy(_uncompiled(unet))
    twin._modules = dict(twin._modules)  # copy.copy leaves both with one dict
    twin.set_submodule(SD1.time_embedding, copy.copy(twin.get_submodule(SD1.time_embedding)))
    vars(twin).pop("save_pretrained", None)  # bound to the first one
    return twin


def _uncompiled(unet: Any) -> UNet2DConditionModel:
    return getattr(unet, "_orig_mod", unet)


def _warn_when_saved(unet: Any) -> None:
    # On the instance: a subclass would be saved under its own name. A bound method, which deepcopy binds to the copy.
    unet.save_pretrained = MethodType(_save_pretrained, unet)


@functools.wraps(UNet2DConditionModel.save_pretrained)
def _save_pretrained(unet: UNet2DConditionModel, *args: Any, **kwargs: Any) -> None:
    warnings.warn(
        "save_pretrained writes the style-less average of this merged model, without its styles; "
        "dmm.save_pipeline(pipe, folder) writes both.",
        stacklevel=2,
    )
    type(unet).save_pretrained(unet, *args, **kwargs)


def _name_as_tools_do(text_encoder: Path) -> None:
    """Give a text encoder's tensors the level of names that transformers 5.6 dropped and other tools expect."""
    tensors = read_tensors(text_encoder)
    level = "text_model."
    if not all(name.startswith(level) for name in tensors):
        named = {level + name.removeprefix(level): tensor for name, tensor in tensors.items()}
        write_tensors(text_encoder, named, {"format": "pt"})
