"""Teachers: models of any format, opened, checked and frozen."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from dmm.errors import UserError
from dmm.families import FAMILIES, SD1
from dmm.formats.folder import UNUSED_COMPONENTS, check_folder, open_folder
from dmm.formats.lora import fuse_lora, read_lora
from dmm.formats.side_car import STYLES_FOLDER
from dmm.formats.single_file import check_single_file, open_single_file, prediction_type_of
from dmm.formats.tensors import PICKLE_SUFFIXES, check_finite, read_header

PREDICTION_TYPES = ("epsilon", "v_prediction")

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from."""

    model: str | Path
    """A stock diffusers folder, a single file (.safetensors; a pickle only with ``allow_pickle``), or a hub id."""
    config: Path | None = None
    """A stock pipeline folder whose configs and tokenizer a single file follows; a folder has its own."""
    lora: Path | None = None
    """A LoRA that is put on ``model``, in kohya's layout or that of diffusers or PEFT."""
    lora_scale: float = 1.0
    """How strongly."""
    prediction_type: str | None = None
    """``epsilon`` or ``v_prediction``; by default what the file or the folder says."""
    allow_pickle: bool = False
    """Open pickles too, with ``weights_only``."""

    def __post_init__(self) -> None:
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise UserError(
                f"{self.model}: the prediction type is '{self.prediction_type}'; one of {', '.join(PREDICTION_TYPES)} "
                "was expected."
            )


def open_pipeline(
    source: ModelSource,
    *,
    torch_dtype: torch.dtype = torch.float32,
    family: str | None = None,
    name: str | None = None,
) -> StableDiffusionPipeline:
    """Open a model of any format as a stock pipeline.

    Everything that can be checked without loading weights is, before any are. A LoRA is fused into the weights, so
    that what comes back is plain. There is no safety checker.

    Args:
        torch_dtype: of the weights in memory, whatever their dtype on disk.
        family: which is expected, a key of ``dmm.families.FAMILIES``; by default SD 1.x.
        name: what error messages call the model, such as ``teacher 'noto'``; by default they begin with its path.
    Raises: UserError: whatever is wrong with the files: missing, cut short, pickled, of another family or
        architecture, incomplete, with values that are not finite, or a LoRA that does not fit.
    """
    with _naming(name):
        expected = FAMILIES[family] if family else SD1
        path = locate(source)
        said = None
        if path.is_dir():
            skeletons = check_folder(path, expected, allow_pickle=source.allow_pickle)
        else:
            header = read_header(path, allow_pickle=source.allow_pickle)
            skeletons = check_single_file(path, header, source.config, expected)
            said = prediction_type_of(path, header)
        lora = read_lora(source.lora, skeletons, allow_pickle=source.allow_pickle) if source.lora else []

        if path.is_dir():
            pipeline = open_folder(path, expected, torch_dtype=torch_dtype, allow_pickle=source.allow_pickle)
        else:
            assert source.config is not None  # check_single_file saw to it
            pipeline = open_single_file(path, expected, config=source.config, torch_dtype=torch_dtype)
        fuse_lora(pipeline, lora, source.lora_scale)
        _set_prediction_type(pipeline, source.prediction_type or said, path)
        for component in expected.components:
            tensors = getattr(pipeline, component.name).state_dict()
            assert not any(tensor.is_meta for tensor in tensors.values()), f"{component.name} is not wholly loaded"
            check_finite(tensors, f"{path}: {component.name}")
        return pipeline


def freeze(module: Module) -> Module:
    """Put a module in ``eval`` for good: no parameter asks for a gradient any more. Returns it."""
    return module.eval().requires_grad_(False)


@contextmanager
def _naming(name: str | None) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if name is None:
            raise
        raise UserError(f"{name}: {error}") from error


def locate(source: ModelSource) -> Path:
    """The local path of a model; a hub id's files are fetched, a merged model's ``styles/`` among them.

    Raises: UserError: there is no such file or folder, and the hub did not give it.
    """
    path = Path(source.model).expanduser()
    if path.exists():
        return path
    hub_id = str(source.model)
    looks_like_id = isinstance(source.model, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub_id)
    if not looks_like_id or path.suffix in (".safetensors", *PICKLE_SUFFIXES) or path.parent.exists():
        raise UserError(f"{source.model}: no such file or folder. Check the path.")
    try:
        downloaded = StableDiffusionPipeline.download(
            hub_id, use_safetensors=None if source.allow_pickle else True, **dict.fromkeys(UNUSED_COMPONENTS)
        )
        # diffusers fetches only what model_index.json names; the snapshot's folder is named by its revision
        snapshot_download(hub_id, revision=Path(downloaded).name, allow_patterns=f"{STYLES_FOLDER}/*")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source.model}: no such folder here, and the hub did not give it: {reason} Check the id, or download "
            "the model and pass its folder."
        ) from error
    return Path(downloaded)


def _set_prediction_type(pipeline: Any, prediction_type: str | None, path: Path) -> None:
    if prediction_type and prediction_type != pipeline.scheduler.config.prediction_type:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    found = pipeline.scheduler.config.prediction_type
    if found not in PREDICTION_TYPES:
        raise UserError(
            f"{path}: its scheduler's prediction type is '{found}'; one of {', '.join(PREDICTION_TYPES)} was expected. "
            "Models of other prediction types cannot be merged."
        )
