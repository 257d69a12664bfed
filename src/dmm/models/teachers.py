"""Teachers: models of any format, opened, checked and frozen."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from dmm.errors import UserError
from dmm.families import Family, components_of
from dmm.files.runs import check_finished
from dmm.files.weights import PICKLE_SUFFIXES
from dmm.formats.configs import find_configs
from dmm.formats.detect import check_is_checkpoint, family_of_file
from dmm.formats.ema import choose_weights
from dmm.formats.folder import UNUSED_COMPONENTS, check_folder, family_of_folder, open_folder, weight_files
from dmm.formats.lora import LoraChange, fuse_lora, lora_file, read_lora
from dmm.formats.schedules import open_scheduler, predicted, read_scheduler_config
from dmm.formats.single_file import check_single_file, open_single_file, scheduler_config_of
from dmm.formats.tensors import check_finite, read_header
from dmm.formats.vae import check_vae, fetch_vae, open_vae
from dmm.maths.diffusion import PredictionType
from dmm.models.style_names import STYLES_FOLDER

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "flow_prediction")

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from."""

    model: str | Path
    """A stock diffusers folder, a single file (.safetensors; a pickle only with ``allow_pickle``), or a hub id."""
    config: Path | None = None
    """A stock pipeline folder whose configs and tokenizer a single file follows, by default as
    :func:`dmm.formats.configs.find_configs` has it; a folder has its own."""
    loras: tuple[tuple[Path, float], ...] = ()
    """LoRAs that are put on ``model``, and how strongly; in kohya's layout or that of diffusers or PEFT."""
    vae: str | Path | None = None
    """A VAE in place of the model's own: a folder, a single file or a hub id."""
    prediction_type: str | None = None
    """``epsilon`` or ``v_prediction``; by default what the file or the folder says."""
    ema: bool = False
    """Of a single file, the running average of the denoiser's weights in their place; it is taken, too, where a file
    has nothing else."""
    allow_pickle: bool = False
    """Open pickles too, with ``weights_only``."""

    def __str__(self) -> str:
        loras = " and ".join(f"{path} at {scale:g}" for path, scale in self.loras)
        return f"{loras} on {self.model}" if loras else str(self.model)

    def __post_init__(self) -> None:
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise UserError(
                f"{self.model}: the prediction type is '{self.prediction_type}'; one of {', '.join(PREDICTION_TYPES)} "
                "was expected."
            )


@dataclass(frozen=True)
class CheckedModel:
    """What is known of a model before its weights are loaded."""

    family: Family
    path: Path
    """Where it is here."""
    configs: Path
    """The pipeline folder whose configs and tokenizer it has."""
    skeletons: dict[str, Any]
    """Its components, without weights."""
    scheduler_config: dict[str, Any]
    """With what it predicts, and what a single file says of its noise."""
    prediction_type: PredictionType
    loras: list[tuple[list[LoraChange], float]]
    """What is to be fused into the weights, and how strongly."""
    vae: Path | None
    """What stands in for its own VAE."""
    denoiser_files: tuple[Path, ...]
    """What holds the denoiser's weights; of LoRAs, their files."""

    @property
    def denoiser(self) -> Any:
        """Its skeleton."""
        return self.skeletons[self.family.denoiser.name]


def check_model(source: ModelSource, *, family: Family | None = None, name: str | None = None) -> CheckedModel:
    """Check everything about a model that can be known without loading its weights.

    Args:
        family: which is expected; by default any.
        name: what error messages call the model, such as ``teacher 'noto'``; by default they begin with its path.
    Raises: UserError: whatever is wrong with the files: missing, cut short, pickled, of another family or
        architecture, incomplete, or a LoRA that does not fit.
    """
    with naming(name):
        path = locate(source)
        if path.is_dir():
            if source.ema:
                raise UserError(f"{path} is a folder, which has no EMA copy of its weights. Take it without ema.")
            configs = path
            family = family or family_of_folder(path)
            skeletons = check_folder(path, family, allow_pickle=source.allow_pickle)
            scheduler_config = read_scheduler_config(path)
            files, _ = weight_files(path / family.denoiser.name, family.denoiser, source.allow_pickle)
        else:
            header = read_header(path, allow_pickle=source.allow_pickle)
            chosen = choose_weights(path, header.tensors, ema=source.ema)
            header = replace(header, tensors={name: header.tensors[kept] for name, kept in chosen.items()})
            family = family or family_of_file(path, header)
            check_is_checkpoint(path, header, family)
            configs = source.config or find_configs(path, header, family)
            skeletons = check_single_file(path, header, configs, family)
            scheduler_config = scheduler_config_of(path, header, configs)
            files = [path]
        loras = [
            (read_lora(lora, skeletons, family, allow_pickle=source.allow_pickle), scale)
            for lora, scale in source.loras
        ]
        if source.loras:
            files = [lora_file(lora) for lora, _ in source.loras]
        vae = None if source.vae is None else _locate_vae(source.vae)
        if vae is not None:
            check_vae(vae, skeletons, family, allow_pickle=source.allow_pickle)
        found = source.prediction_type or predicted(scheduler_config)
        prediction_type = next((known for known in family.prediction_types if known == found), None)
        if prediction_type is None:
            raise UserError(
                f"{path}: its prediction type is '{found}'; {' or '.join(family.prediction_types)} was expected of "
                f"{family.title}. Models of other prediction types cannot be merged."
            )
        if not family.is_flow:  # whose schedulers have no such setting: there is one only
            scheduler_config["prediction_type"] = prediction_type
        return CheckedModel(
            family, path, configs, skeletons, scheduler_config, prediction_type, loras, vae, tuple(files)
        )


def open_pipeline(
    source: ModelSource,
    *,
    torch_dtype: torch.dtype = torch.float32,
    family: Family | None = None,
    name: str | None = None,
) -> DiffusionPipeline:
    """Open a model of any format as a stock pipeline.

    Everything that can be checked without loading weights is, before any are. LoRAs are fused into the weights,
    so that what comes back is plain. There is no safety checker.

    Args:
        torch_dtype: of the weights in memory, whatever their dtype on disk.
        family, name: see :func:`check_model`.
    Raises: UserError: as :func:`check_model`; or values that are not finite.
    """
    checked = check_model(source, family=family, name=name)
    family = checked.family
    with naming(name):
        path = checked.path
        if path.is_dir():
            pipeline = open_folder(path, family, torch_dtype=torch_dtype, allow_pickle=source.allow_pickle)
        else:
            pipeline = open_single_file(path, family, config=checked.configs, torch_dtype=torch_dtype, ema=source.ema)
        for lora, scale in checked.loras:
            fuse_lora(pipeline, lora, scale)
        if checked.vae is not None:
            vae = open_vae(
                checked.vae, config=checked.configs, torch_dtype=torch_dtype, allow_pickle=source.allow_pickle
            )
            pipeline.register_modules(vae=vae)
        pipeline.scheduler = open_scheduler(checked.scheduler_config)
        for component in components_of(pipeline):
            tensors = getattr(pipeline, component.name).state_dict()
            assert not any(tensor.is_meta for tensor in tensors.values()), f"{component.name} is not wholly loaded"
            check_finite(tensors, f"{path}: {component.name}")
        return pipeline


def freeze(module: Module) -> Module:
    """Put a module in ``eval`` for good: no parameter asks for a gradient any more. Returns it."""
    return module.eval().requires_grad_(False)


@contextmanager
def naming(name: str | None) -> Iterator[None]:
    """Within the block, a :class:`UserError` begins with ``name``."""
    try:
        yield
    except UserError as error:
        if name is None:
            raise
        raise UserError(f"{name}: {error}") from error


def locate(source: ModelSource) -> Path:
    """The local path of a model; a hub id's files are fetched, a merged model's ``styles/`` among them.

    Raises: UserError: there is no such file or folder, and the hub did not give it; or a merge that has not ended.
    """
    path = _local(source.model)
    if path is not None:
        check_finished(path)
        return path
    hub_id = str(source.model)
    try:
        downloaded = DiffusionPipeline.download(
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


def _locate_vae(vae: str | Path) -> Path:
    path = _local(vae)
    if path is not None:
        return path
    try:
        return fetch_vae(str(vae))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{vae}: no such folder here, and the hub did not give it: {str(error).splitlines()[0]} Check the id."
        ) from error


def _local(model: str | Path) -> Path | None:
    """The path of what is here; None for a hub id.

    Raises: UserError: it is neither.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    looks_like_id = isinstance(model, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", model)
    if not looks_like_id or path.suffix in (".safetensors", *PICKLE_SUFFIXES) or path.parent.exists():
        raise UserError(f"{model}: no such file or folder. Check the path.")
    return None
