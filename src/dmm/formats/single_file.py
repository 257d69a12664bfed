"""Single files in Stable Diffusion's original layout, as A1111 and ComfyUI read them: check, open, save."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Component, Family, family_of
from dmm.formats.building import building
from dmm.formats.configs import describe_pipeline
from dmm.formats.ema import choose_weights
from dmm.formats.folder import check_configs, without_unused
from dmm.formats.original_layout import (
    V_PREDICTION_MARK,
    Place,
    from_original,
    is_unread,
    original_places,
    to_original,
)
from dmm.formats.schedules import (
    marks,
    read_scheduler_config,
    said_of_schedule,
    with_schedule,
)
from dmm.formats.skeleton import check_nothing_left, check_tensors
from dmm.formats.tensors import Header, read_header, read_tensors, write_tensors

_SPEC_TO_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_PREDICTION_TO_SPEC = {"epsilon": "epsilon", "v_prediction": "v"}


def check_single_file(path: Path, header: Header, config: Path, family: Family) -> dict[str, Any]:
    """Check everything about a single file that can be known without loading its weights.

    Args:
        header: what ``read_header`` found in it, which ``check_is_checkpoint`` has passed.
        config: the stock pipeline folder whose configs it follows.
    Returns: its components' skeletons.
    Raises: UserError: tensors that are missing, left over, or not of the config's
        shapes.
    """
    skeletons = check_configs(config, family)
    used: set[str] = set()
    for name, places in original_places(skeletons, family).items():
        _check_component(skeletons[name], places, header.tensors, path)
        used.update(place.name for place in places.values())
    left = [name for name in header.tensors if name not in used and not is_unread(name, family)]
    check_nothing_left(left, f"an {family.title} model of {config}'s architecture", str(path))
    scheduler_config_of(path, header, config)
    return skeletons


def check_vae_file(path: Path, header: Header, skeletons: Mapping[str, Any], family: Family) -> None:
    """Check that a single file holds a VAE of the skeletons' architecture: alone, or as part of a full checkpoint.

    Raises: UserError: none, or one of another architecture.
    """
    (component,) = (one for one in family.components if one.name == "vae")
    prefix = component.original_prefix
    tensors = header.tensors
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    _check_component(skeletons["vae"], original_places(skeletons, family)["vae"], tensors, path)


def open_single_file(path: Path, family: Family, *, config: Path, torch_dtype: torch.dtype, ema: bool = False) -> Any:
    """Load the pipeline of a file that ``check_single_file`` has passed; its scheduler is the config's.

    Args:
        ema: see :func:`dmm.formats.ema.choose_weights`.
    """
    with _plain_file(path, ema) as plain, building(f"{path} cannot be opened"):
        text_encoders = {
            component.name: _open_text_encoder(plain, component, config, family, torch_dtype)
            for component in family.text_encoders
        }
        return family.pipeline_class.from_single_file(
            str(plain),
            config=str(config),
            dtype=torch_dtype,
            local_files_only=True,
            **text_encoders,
            **without_unused(family),
        )


def _open_text_encoder(file: Path, component: Component, config: Path, family: Family, dtype: torch.dtype) -> Any:
    """A text encoder by its tensors' names: diffusers tells two of one pipeline apart by their widths alone."""
    kind = component.model_class
    with init_empty_weights():  # but with the buffers that no file has
        model = kind(kind.config_class.from_pretrained(config / component.name))
    places = original_places({component.name: model}, family)[component.name]
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in {place.name for place in places.values()}}
    # parts of tensors are copied: one that is kept would keep the whole
    found = {
        name: tensor.to(dtype).clone(memory_format=torch.contiguous_format)
        for name, tensor in from_original(tensors, places).items()
    }
    model.load_state_dict(found, assign=True)
    return model.eval()


@contextmanager
def _plain_file(path: Path, ema: bool) -> Iterator[Path]:
    """A file of the same model that diffusers reads as it stands: not scaled, not pickled, named as it expects."""
    if path.suffix == ".safetensors":
        header = read_header(path)
        chosen = choose_weights(path, header.tensors, ema=ema)
        if not header.scales and all(name == kept for name, kept in chosen.items()):
            yield path
            return
    with tempfile.TemporaryDirectory(prefix="dmm-") as folder:
        plain = Path(folder) / "model.safetensors"
        tensors = read_tensors(path)
        chosen = choose_weights(path, tensors, ema=ema)
        write_tensors(plain, {name: tensors[kept] for name, kept in chosen.items()}, {"format": "pt"})
        yield plain


def prediction_type_of(path: Path, header: Header) -> str | None:
    """What a single file says that its UNet predicts, in diffusers' words; None where it does not say.

    Raises: UserError: it names a prediction type that we do not know.
    """
    spec = header.metadata.get("modelspec.prediction_type")
    if spec is None:
        return "v_prediction" if V_PREDICTION_MARK in header.tensors else None
    if spec not in _SPEC_TO_PREDICTION:
        raise UserError(
            f"{path}: its metadata names the prediction type '{spec}'; one of {', '.join(_SPEC_TO_PREDICTION)} was "
            "expected. Models of other prediction types cannot be merged."
        )
    return _SPEC_TO_PREDICTION[spec]


def scheduler_config_of(path: Path, header: Header, configs: Path) -> dict[str, Any]:
    """The scheduler config of a single file: of its configs, but for what the file itself says of its noise.

    Raises: UserError: there is none, or the file says something that we do not know.
    """
    config = with_schedule(read_scheduler_config(configs), said_of_schedule(path, header))
    said = prediction_type_of(path, header)
    return config if said is None else config | {"prediction_type": said}


def save_single_file(
    pipeline: Any,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a pipeline as one safetensors file of the original layout.

    Args:
        pipeline: a stock pipeline.
        dtype: of the written weights; by default each keeps its own.
        metadata: further strings for the header. What the UNet predicts, and of what noise, is written always: a file
            that does not say is taken for an epsilon model of the usual schedule. So are the configs, by which the file
            opens.
    Raises: UserError: the pipeline has an adapter, or tensors that the original layout has no name for.
    """
    family, models = family_of(pipeline), pipeline.components
    if family.denoiser.layout is None:
        raise UserError(f"{path}: {family.title} has no single file here. Save a folder.")
    tensors: dict[str, Tensor] = {}
    for component, places in original_places(models, family).items():
        if any(isinstance(module, BaseTunerLayer) for module in models[component].modules()):
            raise UserError(f"{path}: the {component} has an adapter on it. Fuse and unload it before saving.")
        found = models[component].state_dict()
        for ours in found:
            if ours not in places:
                raise UserError(
                    f"{path}: the original layout has no name for the {component}'s tensor '{ours}'. Save a plain "
                    f"{family.title} model."
                )
        tensors |= {name: tensor.to(dtype) if dtype else tensor for name, tensor in to_original(found, places).items()}
    scheduler = pipeline.scheduler.config
    tensors |= {name: mark.to(dtype) if dtype else mark for name, mark in marks(scheduler).items()}
    written = {
        **describe_pipeline(pipeline, path),
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.architecture_of(scheduler.prediction_type),
        "modelspec.prediction_type": _PREDICTION_TO_SPEC[scheduler.prediction_type],
    }
    write_tensors(path, tensors, {**written, **(metadata or {})})


def _check_component(model: Any, places: Mapping[str, Place], tensors: Mapping[str, Tensor], path: Path) -> None:
    names = {ours: place.name for ours, place in places.items()}
    check_tensors(model, from_original(tensors, places), str(path), names)
