"""Export: a style of a merged model, or all of them, as checkpoints that other tools open.

For a fixed style, or mix, the style term is a constant vector, which is baked into the one bias after which it would be
added. What is left is an ordinary checkpoint.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

import dmm
from dmm.errors import UserError
from dmm.families import components_of, denoiser_of, family_of
from dmm.files.outputs import new_file, new_folder
from dmm.formats.folder import known_parts
from dmm.formats.lora import in_files
from dmm.formats.original_layout import original_places, to_original
from dmm.formats.single_file import save_single_file
from dmm.formats.tensors import check_finite, read_header, read_tensors, write_tensors
from dmm.maths.mixes import Mix
from dmm.models.adapter_files import file_stems
from dmm.models.authors import authors_layout, rewrite_file, rewrite_folder
from dmm.models.few_step import is_told
from dmm.models.styles import StylePrompts
from dmm.models.text_adapters import clips_of
from dmm.pipeline.style_loras import StyleLoras, write_style_loras
from dmm.pipeline.styled import stock_twin, style_prompts_of, told_of_full_disk, write_stock_folder

SINGLE_FILE = ".safetensors"
"""An output of this suffix is a single file of the original layout; any other is a folder."""
CHECKPOINT_FILE = "model.safetensors"
PATCH_FOLDER = "styles"
LORA_FOLDER = "loras"


def export_style(
    pipe: Any, style: Mix, output: Path, *, dtype: torch.dtype = torch.float32, overwrite: bool = False
) -> None:
    """Write one style, or mix, as an ordinary checkpoint: what it paints is what ``pipe`` paints in that style.

    Args:
        pipe: from ``dmm.load_pipeline``, in float32, so that the bias is rounded once.
        output: a .safetensors file of the original layout, or a stock diffusers folder.
        dtype: of the written weights.
    Raises: UserError: there is no such style; a weight is too large for the dtype; the pipeline has an adapter on it;
        the output exists, or cannot be written.
    """
    mix = {style: 1.0} if isinstance(style, str) else dict(style)
    baked = stock_twin(pipe, mix)
    metadata = describe(pipe, mix)
    if output.suffix == SINGLE_FILE:
        with new_file(output, overwrite=overwrite) as temporary, told_of_full_disk(output):
            _write_single_file(baked, temporary, dtype, metadata)
    else:
        with new_folder(output, overwrite=overwrite, parts=known_parts()) as temporary, told_of_full_disk(output):
            _write_folder(baked, temporary, dtype, metadata)


def export_all(
    pipe: Any, folder: Path, *, single_file: bool = False, dtype: torch.dtype = torch.float32, overwrite: bool = False
) -> StyleLoras:
    """Write every style at once: one checkpoint, and for each style a patch and LoRAs of a few kilobytes.

    The checkpoint is the style-less average; a patch is what the style changes of it (one bias, where styles have no
    adapters), by the name that it has in the checkpoint, in a folder with that of the text encoder in front of it:
    ``styles/NAME.safetensors``. Other tools load the LoRAs, which
    are always float32: ``loras/NAME.safetensors``, see :func:`dmm.pipeline.style_loras.write_style_loras`.

    Args:
        folder: becomes a stock diffusers folder.
        single_file: put ``model.safetensors``, of the original layout, in it instead.
    Returns: what the LoRAs are.
    Raises: UserError: see :func:`export_style`.
    """
    stock, styles = stock_twin(pipe), style_prompts_of(pipe).names
    shared = _patchable(stock, single_file=single_file)
    headers = {style: {"format": "pt", **describe(pipe, {style: 1.0})} for style in styles}
    with (
        new_folder(folder, overwrite=overwrite, parts=(*known_parts(), LORA_FOLDER)) as temporary,
        told_of_full_disk(folder),
    ):
        if single_file:
            _write_single_file(stock, temporary / CHECKPOINT_FILE, dtype, describe(pipe, None))
        else:
            _write_folder(stock, temporary, dtype, describe(pipe, None))
        (temporary / PATCH_FOLDER).mkdir()
        for style, file in zip(styles, patch_files(pipe), strict=True):
            own = _patchable(stock_twin(pipe, style), single_file=single_file)
            patch = {name: weight.to(dtype) for name, weight in own.items() if not weight.equal(shared[name])}
            check_finite(patch, f"the style '{style}'")
            write_tensors(temporary / PATCH_FOLDER / file, patch, headers[style])
        return write_style_loras(pipe, temporary / LORA_FOLDER, headers)


def _patchable(pipe: Any, *, single_file: bool) -> dict[str, Tensor]:
    """What styles may change of a stock pipeline, by the names of patches."""
    family = family_of(pipe)
    models = {family.denoiser.name: denoiser_of(pipe), **clips_of(pipe)}
    if single_file:
        placed = original_places(models, family).items()
        return {
            name: one for part, places in placed for name, one in to_original(models[part].state_dict(), places).items()
        }
    prefixes = {part: "" if part == family.denoiser.name else f"{part}." for part in models}
    return {
        f"{prefixes[part]}{in_files(part, name)}": weight.detach()
        for part, model in models.items()
        for name, weight in model.named_parameters()
    }


def export_authors(pipe: Any, output: Path, *, dtype: torch.dtype = torch.float32, overwrite: bool = False) -> None:
    """Write a merged model, all its styles in it, in the layout that DMM's authors released.

    Args:
        output: a folder; or a .safetensors file, the original layout with the side-car's five tensors beside it.
    Raises: UserError: see :func:`export_style`; or the styles are adapters, for which that layout has no place.
    """
    prompts: StylePrompts = style_prompts_of(pipe)
    if prompts.adapters:
        raise UserError(
            "The styles of this model are adapters, for which the layout of DMM's authors has no place: it keeps style "
            "prompts alone. Export with --all, or one style with --style."
        )
    family = family_of(pipe)
    authors_layout(family)  # refuses before anything is written
    stock, metadata = stock_twin(pipe), describe(pipe, None)
    check_finite({name: tensor.to(dtype) for name, tensor in prompts.state_dict().items()}, "the style prompts")
    if output.suffix == SINGLE_FILE:
        with new_file(output, overwrite=overwrite) as temporary, told_of_full_disk(output):
            _write_single_file(stock, temporary, dtype, metadata)
            rewrite_file(temporary, prompts, family, family.denoiser.original_prefix)
    else:
        with new_folder(output, overwrite=overwrite, parts=known_parts()) as temporary, told_of_full_disk(output):
            _write_folder(stock, temporary, dtype, metadata)
            rewrite_folder(temporary, prompts, family)


def patch_files(pipe: Any) -> list[str]:
    """The patches' file names, in the order of the styles; what a file system may not take is a hyphen."""
    return [f"{stem}.safetensors" for stem in file_stems(style_prompts_of(pipe).names)]


def describe(pipe: Any, mix: Mapping[str, float] | None) -> dict[str, str]:
    """What a weight file's header says of where it came from, in the words that other tools read.

    Args:
        mix: what is baked; None of the style-less average.
    Returns: ``modelspec.*`` and ``sd_merge_*``. Sources stand by their sha256 and the last part of their name: the
        rest of a path is nobody's business.
    """
    provenance = style_prompts_of(pipe).provenance
    told = "style-less average" if mix is None else ", ".join(f"{name}={weight:g}" for name, weight in mix.items())
    size = family_of(pipe).sample_size_of(denoiser_of(pipe).config)
    height, width = (side * pipe.vae_scale_factor for side in ((size, size) if isinstance(size, int) else size))
    metadata = {
        "modelspec.title": f"DMM merge: {told}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.merged_from": ", ".join(_source_name(one.source) for one in provenance),
        "sd_merge_recipe": json.dumps({"type": "dmm", "version": dmm.__version__, "style": mix}, ensure_ascii=False),
        "sd_merge_models": json.dumps(
            {
                one.sha256: {"name": _source_name(one.source), "style": one.name, "legacy_hash": None}
                for one in provenance
            },
            ensure_ascii=False,
        ),
    }
    if not provenance:
        del metadata["modelspec.merged_from"], metadata["sd_merge_models"]
    return metadata


def _source_name(source: str) -> str:
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1]


def _write_single_file(pipe: Any, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    if is_told(denoiser_of(pipe).config):
        raise UserError(
            "This model is told its guidance by a layer that single files have no name for. Export a folder; or "
            "accelerate the model with one guidance, which is in the weights."
        )
    _check_in(pipe, dtype)
    save_single_file(pipe, path, dtype=dtype, metadata=metadata)


def _write_folder(pipe: Any, folder: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    _check_in(pipe, dtype)
    write_stock_folder(pipe, folder)
    family = family_of(pipe)
    for component in components_of(pipe):
        for file in (folder / component.name).glob("*.safetensors"):
            tensors = {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in read_tensors(file).items()
            }
            more = metadata if component is family.denoiser else {}
            write_tensors(file, tensors, {**read_header(file).metadata, **more})


def _check_in(pipe: Any, dtype: torch.dtype) -> None:
    for component in components_of(pipe):
        model = getattr(pipe, component.name)
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UserError(
                f"The {component.name} has an adapter on it. Fuse it into the weights and unload it before exporting."
            )
        check_finite({name: t.to(dtype) for name, t in model.state_dict().items()}, f"the {component.name}")
