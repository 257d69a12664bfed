"""The nodes: what a graph shows of loading, mixing, scheduling and applying styles."""

from typing import Any

import comfy.hooks

from .loading import all_style_names, load_parts, merged_models
from .patches import apply_style, read_in_style, style_hooks
from .side_car import StyleSet, read_styles
from .styles import NONE, Style, mix, then

CATEGORY = "DMM"
NUM_SLOTS = 4
"""Styles in one mix node; more are had by chaining."""


class LoadModel:
    """A merged model from models/diffusers, and its styles."""

    CATEGORY = CATEGORY
    DESCRIPTION = "A merged model: a folder in models/diffusers that dmm wrote. Without a style it paints the average."
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "DMM_STYLES")
    RETURN_NAMES = ("MODEL", "CLIP", "VAE", "STYLES")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (list(merged_models()),)}}

    def load(self, model: str) -> tuple[Any, Any, Any, StyleSet]:
        found = merged_models()
        if model not in found:
            raise ValueError(f"There is no merged model '{model}' in models/diffusers.")
        return (*load_parts(found[model]), read_styles(found[model]))


class StyleMix:
    """A style, or a mix of several by weight."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Weights are shares: 1 and 1 are half and half. The mix is taken between the styles themselves, as dmm does; "
        "chain nodes for more than four."
    )
    RETURN_TYPES = ("DMM_STYLE",)
    RETURN_NAMES = ("STYLE",)
    FUNCTION = "mix"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [NONE, *all_style_names()]
        widgets: dict[str, Any] = {}
        for i in range(1, NUM_SLOTS + 1):
            widgets[f"style_{i}"] = (names, {"default": names[min(1, len(names) - 1)] if i == 1 else NONE})
            widgets[f"weight_{i}"] = ("FLOAT", {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.01})
        return {"required": {"styles": ("DMM_STYLES",), **widgets}, "optional": {"and_mix": ("DMM_STYLE",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, style_1: str, style_2: str, style_3: str, style_4: str) -> bool:
        # the list is of the models that were there when it was made; `mix` knows what this model has
        return True

    def mix(self, styles: StyleSet, and_mix: Style | None = None, **widgets: Any) -> tuple[Style]:
        chosen = [(widgets[f"style_{i}"], widgets[f"weight_{i}"]) for i in range(1, NUM_SLOTS + 1)]
        return (mix(styles, chosen, and_mix),)


class StyleSchedule:
    """One style first, another later."""

    CATEGORY = CATEGORY
    DESCRIPTION = "The first steps settle the shapes, the last the surface. Chain nodes for more than two parts."
    RETURN_TYPES = ("DMM_STYLE",)
    RETURN_NAMES = ("STYLE",)
    FUNCTION = "schedule"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        at = ("FLOAT", {"default": 0.4, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "share of the steps"})
        return {"required": {"before": ("DMM_STYLE",), "after": ("DMM_STYLE",), "at": at}}

    def schedule(self, before: Style, after: Style, at: float) -> tuple[Style]:
        return (then(before, after, at),)


class ApplyStyle:
    """A model that paints all of the picture in a style."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Patches a clone of the model; the one that goes in stays as it is."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "style": ("DMM_STYLE",)}}

    def apply(self, model: Any, style: Style) -> tuple[Any]:
        return (apply_style(model, style),)


class ReadInStyle:
    """Text encoders that read prompts in a style."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "For styles whose teachers had text encoders of their own; with others the CLIP reads as it did. Patches a "
        "clone. A style over time is read in as it begins."
    )
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",), "style": ("DMM_STYLE",)}}

    def apply(self, clip: Any, style: Style) -> tuple[Any]:
        return (read_in_style(clip, style),)


class StyleByRegion:
    """Conditionings that are painted in a style of their own, where a mask is white."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Takes the place of a style of the whole model. Put several together with 'Cond Pair Combine', and what is "
        "left with 'Cond Pair Set Default Combine'."
    )
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01})
        wires = dict.fromkeys(("positive", "negative"), ("CONDITIONING",))
        return {
            "required": {**wires, "style": ("DMM_STYLE",), "strength": strength},
            "optional": {"mask": ("MASK",)},
        }

    def apply(self, positive: Any, negative: Any, style: Style, strength: float, mask: Any = None) -> tuple[Any, Any]:
        given, hooks = [positive, negative], style_hooks(style)
        return tuple(comfy.hooks.set_conds_props(given, strength, "default", mask=mask, hooks=hooks))


NODE_CLASS_MAPPINGS = {
    "DMMLoadModel": LoadModel,
    "DMMStyleMix": StyleMix,
    "DMMStyleSchedule": StyleSchedule,
    "DMMApplyStyle": ApplyStyle,
    "DMMReadInStyle": ReadInStyle,
    "DMMStyleByRegion": StyleByRegion,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DMMLoadModel": "Load DMM model",
    "DMMStyleMix": "DMM style mix",
    "DMMStyleSchedule": "DMM style schedule",
    "DMMApplyStyle": "DMM apply style",
    "DMMReadInStyle": "DMM read in style",
    "DMMStyleByRegion": "DMM style by region",
}
