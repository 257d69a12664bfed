"""What LoRAs' layouts call a model's layers.

A layer ``down_blocks.0.attentions.0...to_q`` of a UNet, which its pipeline calls ``unet``, is, by layout::

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

from dmm.families import FAMILIES, Component, Family

_PEFT = "base_model.model."
_LEVEL = "text_model."
"""Of text encoders' names: transformers 5.6 dropped it from one class and kept it in another; files have it."""
_BELOW_IT = ("embeddings.", "encoder.layers.", "final_layer_norm")
_DENOISERS = "lora_unet_"
_TEXT_ENCODERS = "lora_te_"
_FIRST = "text_encoder"


def kohya_name(component: str, module: str, family: Family | None = None) -> str:
    """A layer's name in kohya's layout.

    Args:
        family: of the model; None of one that is not known here, whose text encoder, if any, is its only one.
    """
    return (_kohya_prefixes(component, family)[0] + in_files(component, module)).replace(".", "_")


def layers_by_name(models: Mapping[str, Any], family: Family | None = None) -> dict[str, tuple[str, str]]:
    """Each layer that can be changed, as (component, module), by every name that a layout gives it.

    Args:
        models: a pipeline's denoiser and text encoders, by component.
        family: of the model, by which several text encoders are told apart.
    """
    names: dict[str, tuple[str, str]] = {}
    for component, model in models.items():
        for module, layer in model.named_modules():
            if module and any(True for _ in layer.parameters(recurse=False)):
                for name in _names_of(component, module, family):
                    names.setdefault(name, (component, module))
    return names


def layers_by_original_name(component: str, original: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The denoiser's layers by the names that the original layout of single files gives them.

    Args:
        component: the denoiser's name.
        original: what the original layout calls each of its tensors.
    """
    names = {}
    for ours, theirs in original.items():
        module = ours.rpartition(".")[0]
        path = theirs.rpartition(".")[0].removeprefix("model.").removeprefix("diffusion_model.")
        flat = path.replace(".", "_")
        for name in (f"diffusion_model.{path}", f"model.diffusion_model.{path}", f"{_DENOISERS}{flat}"):
            names[name] = (component, module)
    return names


def kohya_name_of(layer: str, family: Family | None = None) -> str | None:
    """Kohya's name of a layer from any layout's, without a model; None where that cannot be told.

    It cannot of names of the original layout, whose blocks are counted otherwise.

    Args:
        family: of the model that the layer is of, as far as it is known.
    """
    if layer.startswith("lora_"):
        return layer
    if layer.startswith("lycoris_"):
        flat = layer.removeprefix("lycoris_")
        reads_text = flat.startswith(_LEVEL.replace(".", "_"))
        return (_kohya_prefixes(_FIRST, family) if reads_text else _denoiser_prefixes(family))[0] + flat
    path = layer.removeprefix(_PEFT)
    for one in _named_by_path(family):
        if path.startswith(f"{one.name}."):
            return kohya_name(one.name, path.removeprefix(f"{one.name}."), family)
    if path.startswith((_LEVEL, "encoder.layers.")):
        return kohya_name(_FIRST, path, family)
    if path.startswith(("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.", "add_embedding.")):
        return _denoiser_prefixes(family)[0] + path.replace(".", "_")
    return None


def _named_by_path(family: Family | None) -> list[Component]:
    """The parts whose layers kohya calls by their paths: text encoders, and UNets; of transformers it counts the blocks
    otherwise.
    """
    families = [family] if family else list(FAMILIES.values())
    denoisers = [one.denoiser for one in families if one.denoiser.layout]
    return [*denoisers, *(reader for one in families for reader in one.text_encoders)]


def _denoiser_prefixes(family: Family | None) -> tuple[str, ...]:
    return family.denoiser.kohya if family else (_DENOISERS,)


def _kohya_prefixes(component: str, family: Family | None) -> tuple[str, ...]:
    for one in family.components if family else ():
        if one.name == component:
            return one.kohya
    if component == "text_encoder_2":
        return ("lora_te2_",)
    return (_TEXT_ENCODERS, "lora_te1_") if component.startswith("text_encoder") else (_DENOISERS,)


def in_files(component: str, module: str) -> str:
    """The path of a module, or of its parameter, as files have it, whatever its class calls it."""
    below = component.startswith("text_encoder") and module.startswith(_BELOW_IT)
    return f"{_LEVEL}{module}" if below else module


def _names_of(component: str, module: str, family: Family | None) -> Iterator[str]:
    prefixes = _kohya_prefixes(component, family)
    if not component.startswith("text_encoder"):
        flat = module.replace(".", "_")
        yield from (
            f"{prefixes[0]}{flat}",
            f"{component}.{module}",
            f"lycoris_{flat}",
            f"{_PEFT}{module}",
            module,
            f"{_PEFT}{component}.{module}",
        )
        return
    comfy = next((one.comfy for one in family.components if one.name == component), ()) if family else ()
    whole = in_files(component, module)
    for path in dict.fromkeys((whole, whole.removeprefix(_LEVEL))):
        flat = path.replace(".", "_")
        for prefix in prefixes:
            yield f"{prefix}{flat}"
        for prefix in (f"{component}.", f"{_PEFT}{component}.", *comfy):
            yield f"{prefix}{path}"
        # names that do not say of which text encoder they are: the first comes first
        yield from (f"lycoris_{flat}", f"{_PEFT}{path}", path)


def is_layer(module: nn.Module) -> bool:
    """Whether low-rank changes go on a module."""
    return isinstance(module, nn.Linear | nn.Conv2d)
