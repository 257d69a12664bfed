"""What guides a pipeline beside its prompt: ControlNets, an image to begin with, a mask, an IP-Adapter.

All of it is diffusers' own; here it is opened, held against the model, and put on a pipeline. Styles stay on: a
merged model's denoiser is the same object before and after.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from transformers import CLIPVisionModelWithProjection

from dmm.errors import UserError
from dmm.families import denoiser_of, family_of
from dmm.files.json import read_json
from dmm.files.picture_reader import open_picture
from dmm.formats.building import building, check_config
from dmm.formats.tensors import read_header
from dmm.maths.mixes import Mix
from dmm.models.styles import styled_port
from dmm.pipeline.controls import control_names, open_net, set_control

IMAGE_ENCODER_FOLDER = "image_encoder"
"""Where an IP-Adapter's image encoder is, beside its file, unless told otherwise."""


MASKED_CHANNELS = 4
"""Of the latents that diffusers' inpainting takes of a text-to-image model."""


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it follows."""

    model: Path
    """Its diffusers folder."""
    image: Path
    """An edge map, a pose, a depth map: whatever it was trained on."""
    scale: float = 1.0
    """How strongly."""
    control: Mix | None = None
    """Of a merged ControlNet, which of its controls the image is for."""


@dataclass(frozen=True)
class Start:
    """An image to begin with, in place of noise."""

    image: Path
    strength: float
    """How much of the noise is put on it, in (0, 1]; 1 leaves nothing of it."""
    mask: Path | None = None
    """White where the image is to be painted anew."""


@dataclass(frozen=True)
class IPAdapter:
    """A picture as a prompt."""

    file: Path
    """The adapter's weights, .safetensors."""
    image: Path
    scale: float = 1.0
    """How strongly."""
    image_encoder: Path | None = None
    """The folder of the CLIP model that reads the picture; by default ``image_encoder`` beside the file."""


def add_plugins(
    pipe: Any,
    *,
    controls: Sequence[Control] = (),
    start: Start | None = None,
    ip_adapter: IPAdapter | None = None,
    by_turns: bool = False,
) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """Put plugins on a Stable Diffusion pipeline.

    Args:
        pipe: on its device and in its dtype; an IP-Adapter changes its denoiser.
        by_turns: the controls are of one merged ControlNet, which follows them one after the other.
    Returns: the pipeline that takes them, on the same weights; and the arguments that its call takes for them, as a
        function of the batch size, of the width and height in pixels and, by turns, of the control that it follows
        from now on.
    Raises: UserError: a file is missing, or made for a model of another family; a mask, and the model's latents do not
        have the channels that diffusers' inpainting takes.
    """
    if start is not None and start.mask is not None:
        _check_takes_masks(pipe)
    family = family_of(pipe)
    given = {"control": bool(controls), "image": start is not None, "mask": start is not None and bool(start.mask)}
    guides = frozenset(name for name, one in given.items() if one)
    if guides not in family.pipelines or (ip_adapter is not None and family.controlnet is None):
        told = [*sorted(guides), *(["IP-Adapter"] if ip_adapter is not None else [])]
        raise UserError(f"{family.title} is not guided by {' and '.join(told)} here. Leave it out.")
    pictures = {file: open_picture(file) for file in _pictures(controls, start, ip_adapter)}
    nets = [_open_control(control, pipe) for control in (controls[:1] if by_turns else controls)]
    parts = dict(pipe.components)
    if ip_adapter is not None:
        _check_ip_adapter(ip_adapter.file, denoiser_of(pipe))
        parts["image_encoder"] = _open_image_encoder(ip_adapter, pipe)
    kind = family.pipelines[guides]
    if nets:
        parts["controlnet"] = nets if len(nets) > 1 else nets[0]
    guided = kind(**parts, **_settings(kind, pipe, parts))
    if ip_adapter is not None:
        guided.load_ip_adapter(
            str(ip_adapter.file.parent),
            subfolder="",
            weight_name=ip_adapter.file.name,
            image_encoder_folder=None,
            local_files_only=True,
        )
        guided.set_ip_adapter_scale(ip_adapter.scale)

    def inputs(batch_size: int, size: tuple[int, int], follows: Control | None = None) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if follows is not None:
            set_control(nets[0], follows.control)
        followed = controls if follows is None else [follows]
        if followed:
            images = [pictures[control.image].resize(size, Image.Resampling.LANCZOS) for control in followed]
            scales = [control.scale for control in followed]
            arguments["image" if start is None else "control_image"] = images if len(images) > 1 else images[0]
            arguments["controlnet_conditioning_scale"] = scales if len(scales) > 1 else scales[0]
        if start is not None:
            # one for each picture of the batch: each is encoded with the noise of its own seed
            first = pictures[start.image].resize(size, Image.Resampling.LANCZOS)
            arguments |= {"image": [first] * batch_size, "strength": start.strength}
            if start.mask is not None:
                arguments["mask_image"] = [pictures[start.mask].convert("L").resize(size)] * batch_size
        if ip_adapter is not None:
            arguments["ip_adapter_image"] = pictures[ip_adapter.image]
        return arguments

    return guided, inputs


def _open_control(control: Control, pipe: Any) -> Any:
    denoiser = denoiser_of(pipe)
    net = open_net(control.model, denoiser, torch_dtype=denoiser.dtype)
    is_merged = styled_port(net) is not None
    if is_merged and control.control is None:
        raise UserError(f"{control.model} has several controls: choose from {', '.join(control_names(net))}.")
    if control.control is not None:
        if not is_merged:
            raise UserError(f"{control.model} is a stock ControlNet, which has one control only: leave its name out.")
        set_control(net, control.control)
    return net.to(denoiser.device)


def _settings(kind: Any, pipe: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline of another class is told beside its parts, for it to paint as this one does."""
    names = set(inspect.signature(kind.__init__).parameters) - set(parts)
    told = {name: pipe.config[name] for name in names if name in pipe.config}
    return told | ({"requires_safety_checker": False} if "requires_safety_checker" in names else {})


def _check_takes_masks(pipe: Any) -> None:
    denoiser = denoiser_of(pipe)
    # of other models diffusers raises an error in the midst of painting, or, with a ControlNet, drops the mask
    if not family_of(pipe).is_flow and denoiser.config.in_channels != MASKED_CHANNELS:
        raise UserError(
            f"A mask is for models whose latents have {MASKED_CHANNELS} channels; this one's have "
            f"{denoiser.config.in_channels}. Paint the whole --image, without --mask, or choose another model."
        )


def _pictures(controls: Sequence[Control], start: Start | None, ip_adapter: IPAdapter | None) -> list[Path]:
    files = [control.image for control in controls]
    if start is not None:
        files += [start.image, *([start.mask] if start.mask else [])]
    return files + ([ip_adapter.image] if ip_adapter else [])


def _check_ip_adapter(file: Path, denoiser: Any) -> None:
    found = {
        int(name.split(".")[1]): tuple(tensor.shape)
        for name, tensor in read_header(file).tensors.items()
        if name.startswith("ip_adapter.") and name.endswith(".to_k_ip.weight")
    }
    if not found:
        raise UserError(
            f"{file} is no IP-Adapter: it has no tensor named 'ip_adapter....to_k_ip.weight'. Pass its .safetensors "
            "file, such as ip-adapter_sd15.safetensors."
        )
    expected = [
        tuple(denoiser.get_submodule(name.removesuffix(".processor")).to_k.weight.shape)
        for name in denoiser.attn_processors
        if name.endswith("attn2.processor")
    ]
    if [found[number] for number in sorted(found)] != expected:
        raise UserError(
            f"{file}: the IP-Adapter is for {len(found)} attention layers, the first of shape {found[min(found)]}, the "
            f"model has {len(expected)}, the first of shape {expected[0]}. It was made for a model of another family; "
            "choose one for this."
        )


def _open_image_encoder(adapter: IPAdapter, pipe: Any) -> nn.Module:
    folder = adapter.image_encoder or adapter.file.parent / IMAGE_ENCODER_FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no CLIP image encoder there, which the IP-Adapter {adapter.file} needs. Name its folder with "
            "--image-encoder."
        )
    check_config(read_json(folder / "config.json"), folder / "config.json", CLIPVisionModelWithProjection)
    with building(f"{folder}: the image encoder could not be opened"):
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            folder, dtype=denoiser_of(pipe).dtype, local_files_only=True
        )
    return encoder.to(denoiser_of(pipe).device)
