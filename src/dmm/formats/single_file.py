"""Single files in Stable Diffusion's original layout, as A1111 and ComfyUI read them: check, open, save."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_MAPPING,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from dmm.errors import UserError
from dmm.families import Family, family_of
from dmm.formats.building import building
from dmm.formats.configs import describe_pipeline
from dmm.formats.ema import choose_weights
from dmm.formats.folder import check_configs, without_unused
from dmm.formats.schedules import (
    V_PREDICTION_MARK,
    ZERO_SNR_MARK,
    marks,
    read_scheduler_config,
    said_of_schedule,
    with_schedule,
)
from dmm.formats.skeleton import check_nothing_left, check_tensors
from dmm.formats.tensors import Header, read_header, read_tensors, write_tensors

HARMLESS = (
    "model_ema.*",
    "first_stage_model.loss.*",
    "*.position_ids",
    "*.logit_scale",
    "*.text_projection*",
    "*alphas_cumprod*",
    "betas",
    "posterior_*",
    "logvar",
    "lvlb_weights",
    "scale_factor",
    V_PREDICTION_MARK,
    ZERO_SNR_MARK,
)
"""Left in files by training scripts and by older libraries; nothing that samples reads them."""

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
    for name, names in original_names(skeletons, family).items():
        _check_component(skeletons[name], names, header.tensors, path)
        used.update(names.values())
    left = [
        name for name in header.tensors if name not in used and not any(fnmatchcase(name, known) for known in HARMLESS)
    ]
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
    _check_component(skeletons["vae"], original_names(skeletons, family)["vae"], tensors, path)


def open_single_file(path: Path, family: Family, *, config: Path, torch_dtype: torch.dtype, ema: bool = False) -> Any:
    """Load the pipeline of a file that ``check_single_file`` has passed; its scheduler is the config's.

    Args:
        ema: see :func:`dmm.formats.ema.choose_weights`.
    """
    with _plain_file(path, ema) as plain, building(f"{path} cannot be opened"):
        return family.pipeline_class.from_single_file(
            str(plain),
            config=str(config),
            dtype=torch_dtype,
            local_files_only=True,
            **without_unused(family),
        )


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
    tensors: dict[str, Tensor] = {}
    for component, names in original_names(models, family).items():
        if any(isinstance(module, BaseTunerLayer) for module in models[component].modules()):
            raise UserError(f"{path}: the {component} has an adapter on it. Fuse and unload it before saving.")
        for ours, tensor in models[component].state_dict().items():
            if ours not in names:
                raise UserError(
                    f"{path}: the original layout has no name for the {component}'s tensor '{ours}'. Save a plain "
                    f"{family.title} model."
                )
            theirs = names[ours]
            if is_vae_attention(theirs) and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            tensors[theirs] = tensor.to(dtype) if dtype else tensor
    scheduler = pipeline.scheduler.config
    tensors |= {name: mark.to(dtype) if dtype else mark for name, mark in marks(scheduler).items()}
    written = {
        **describe_pipeline(pipeline, path),
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.architecture,
        "modelspec.prediction_type": _PREDICTION_TO_SPEC[scheduler.prediction_type],
    }
    write_tensors(path, tensors, {**written, **(metadata or {})})


def original_names(models: Mapping[str, Any], family: Family) -> dict[str, dict[str, str]]:
    """What the original layout calls each tensor.

    No table by hand: diffusers' own converters are run on dummies under every plausible original name, and those that
    land on a tensor of the model are that tensor's name.

    Args:
        models: by the components' names, all or some of them, with weights or on the meta device.
    Returns: component -> the model's own name -> the name in the file.
    """
    converters = {
        "unet": lambda model, dummies: convert_ldm_unet_checkpoint(dummies, model.config),
        "vae": lambda model, dummies: convert_ldm_vae_checkpoint(dummies, model.config),
        # the level that transformers 5.6 dropped from the class is kept in the files
        "text_encoder": lambda _, dummies: {
            name.removeprefix("cond_stage_model.transformer.text_model."): dummy for name, dummy in dummies.items()
        },
    }
    candidates = {"unet": _unet_candidates, "vae": _vae_candidates, "text_encoder": _text_candidates}
    result = {}
    for component in family.components:
        if component.name not in models:
            continue
        model = models[component.name]
        names = [component.original_prefix + name for name in dict.fromkeys(candidates[component.name](model))]
        dummies = {name: torch.tensor(i) for i, name in enumerate(names)}
        converted = converters[component.name](model, dummies)
        result[component.name] = {
            ours: names[int(converted[ours])] for ours in model.state_dict() if converted.get(ours) is not None
        }
    return result


def _check_component(model: Any, names: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> None:
    found = {
        ours: _as_linear(tensors[theirs]) if is_vae_attention(theirs) else tensors[theirs]
        for ours, theirs in names.items()
        if theirs in tensors
    }
    check_tensors(model, found, str(path), names)


def _unet_candidates(unet: Any) -> Iterator[str]:
    names = list(unet.state_dict())
    yield from DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"].values()
    layers = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    resnet = [f"0.{layer}" for layer in layers]
    attention = [f"1.{name.split('.', 1)[1]}" for name in _after(names, ".attentions.")]
    per_block = unet.config.layers_per_block + 1
    for i in range(len(unet.config.block_out_channels) * per_block + 1):
        for tail in _parameters([*resnet, "0.op"]) + attention:
            yield f"input_blocks.{i}.{tail}"
        block = f"up_blocks.{i // per_block}."
        # the upsampler comes after the attention, where there is one
        place = 2 if any(name.startswith(f"{block}attentions.") for name in names) else 1
        for tail in _parameters([*resnet, f"{place}.conv"]) + attention:
            yield f"output_blocks.{i}.{tail}"
    for i, tail in product((0, 2), _parameters(resnet)):
        yield f"middle_block.{i}.{tail.removeprefix('0.')}"
    for tail in attention:
        yield f"middle_block.{tail}"


def _vae_candidates(vae: Any) -> Iterator[str]:
    yield from DIFFUSERS_TO_LDM_MAPPING["vae"].values()
    resnet = _parameters(["norm1", "conv1", "norm2", "conv2", "nin_shortcut"])
    for side, level, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for tail in resnet:
            yield f"{side}.mid.block_1.{tail}"
            yield f"{side}.mid.block_2.{tail}"
        for tail in _parameters(["norm", "q", "k", "v", "proj_out"]):
            yield f"{side}.mid.attn_1.{tail}"
        for i in range(len(vae.config.block_out_channels)):
            for j, tail in product(range(vae.config.layers_per_block + 1), resnet):
                yield f"{side}.{level}.{i}.block.{j}.{tail}"
            for tail in _parameters([f"{sampler}.conv"]):
                yield f"{side}.{level}.{i}.{tail}"


def _text_candidates(text_encoder: Any) -> Iterator[str]:
    for name in text_encoder.state_dict():
        yield f"text_model.{name}"


def _after(names: list[str], part: str) -> list[str]:
    return list(dict.fromkeys(name.split(part, 1)[1] for name in names if part in name))


def _parameters(layers: list[str]) -> list[str]:
    return [f"{layer}.{parameter}" for layer in layers for parameter in ("weight", "bias")]


def is_vae_attention(name: str) -> bool:
    """Whether the original layout has a 1x1 convolution where diffusers has a linear layer."""
    return ".mid.attn_1." in name and name.endswith(".weight") and ".norm." not in name


def _as_linear(tensor: Tensor) -> Tensor:
    return tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
