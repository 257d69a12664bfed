"""Merge many fine-tuned Stable Diffusion models into one style-promptable model by distillation."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmm.pipeline.controls import control_names, load_controls, save_controls, set_control
    from dmm.pipeline.regions import Region, paint_regions
    from dmm.pipeline.style_schedule import StyleSchedule
    from dmm.pipeline.styled import load_pipeline, save_pipeline, set_style, share, style_names, style_over_time

__version__ = "0.2.0"
__all__ = [
    "Region",
    "StyleSchedule",
    "control_names",
    "load_controls",
    "load_pipeline",
    "paint_regions",
    "save_controls",
    "save_pipeline",
    "set_control",
    "set_style",
    "share",
    "style_names",
    "style_over_time",
]

# torch and diffusers take seconds to import, which whoever only asks for the version should not wait for
_HOMES = dict.fromkeys(__all__, "dmm.pipeline.styled") | {
    "StyleSchedule": "dmm.pipeline.style_schedule",
    "Region": "dmm.pipeline.regions",
    "paint_regions": "dmm.pipeline.regions",
    **dict.fromkeys(("control_names", "load_controls", "save_controls", "set_control"), "dmm.pipeline.controls"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dmm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
