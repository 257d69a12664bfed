"""What LoRAs' layouts call a model's layers.

A layer ``down_blocks.0.attentions.0...to_q`` of a UNet is, by layout::

    lora_unet_down_blocks_0_attentions_0_..._to_q            kohya
    lora_unet_input_blocks_1_1_..._to_q                      kohya, of the original layout
    lycoris_down_blocks_0_attentions_0_..._to_q              LyCORIS' wrapper
    unet.down_blocks.0.attentions.0...to_q                   diffusers
    base_model.model.down_blocks.0.attentions.0...to_q       PEFT
    down_blocks.0.attentions.0...to_q                        diffusers' save_lora_adapter
    diffusion_model.input_blocks.1.1...to_q                  ComfyUI's saver
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_PEFT = "base_model.model."
_LEVEL = "text_model."
"""Of text encoders' names: transformers 5.6 dropped it from the class, files keep it."""


def kohya_name(component: str, module: str) -> str:
    """A layer's name in kohya's layout."""
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    return prefix + module.replace(".", "_")


def layers_by_name(models: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Each layer that can be changed, as (component, module), by every name that a layout gives it.

    Args:
        models: a pipeline's denoiser and text encoders, by component.
    """
    names: dict[str, tuple[str, str]] = {}
    for component, model in models.items():
        for module, layer in model.named_modules():
            if module and any(True for _ in layer.parameters(recurse=False)):
                for name in _names_of(component, module):
                    names.setdefault(name, (component, module))
    return names


def layers_by_original_name(models: Mapping[str, Any], original: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The denoiser's layers by the names that the original layout of single files gives them.

    Args:
        models: as for :func:`layers_by_name`, the denoiser first.
        original: what the original layout calls each of the denoiser's tensors.
    """
    component = next(iter(models))
    names = {}
    for ours, theirs in original.items():
        module = ours.rpartition(".")[0]
        path = theirs.rpartition(".")[0].removeprefix("model.").removeprefix("diffusion_model.")
        flat = path.replace(".", "_")
        for name in (f"diffusion_model.{path}", f"model.diffusion_model.{path}", f"lora_unet_{flat}"):
            names[name] = (component, module)
    return names


def kohya_name_of(layer: str) -> str | None:
    """Kohya's name of a layer from any layout's, without a model; None where that cannot be told.

    It cannot of names of the original layout, whose blocks are counted otherwise.
    """
    if layer.startswith("lora_"):
        return layer
    if layer.startswith("lycoris_"):
        flat = layer.removeprefix("lycoris_")
        return f"lora_te_{flat}" if flat.startswith("text_model_") else f"lora_unet_{flat}"
    path = layer.removeprefix(_PEFT)
    for component in ("unet", "text_encoder"):
        if path.startswith(f"{component}."):
            return kohya_name(component, path.removeprefix(f"{component}.").removeprefix(_LEVEL))
    if path.startswith((_LEVEL, "encoder.layers.")):
        return kohya_name("text_encoder", path.removeprefix(_LEVEL))
    if path.startswith(("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.")):
        return kohya_name("unet", path)
    return None


def _names_of(component: str, module: str) -> Iterator[str]:
    flat = module.replace(".", "_")
    yield kohya_name(component, module)
    if not component.startswith("text_encoder"):
        yield from (
            f"{component}.{module}",
            f"lycoris_{flat}",
            f"{_PEFT}{module}",
            module,
            f"{_PEFT}{component}.{module}",
        )
        return
    # with and without the level that transformers dropped; diffusers' writer of kohya's layout says te1 of any model
    for level in ("", _LEVEL):
        flat_level = level.replace(".", "_")
        for one in ("", "1"):
            yield f"lora_te{one}_{flat_level}{flat}"
        yield f"lycoris_{flat_level}{flat}"
        for prefix in (f"{component}.", _PEFT, f"{_PEFT}{component}.", "", "text_encoders.clip_l.transformer."):
            yield f"{prefix}{level}{module}"


def is_layer(module: nn.Module) -> bool:
    """Whether low-rank changes go on a module."""
    return isinstance(module, nn.Linear | nn.Conv2d)
