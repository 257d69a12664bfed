"""What new styles change of the text encoders, known before anything is trained: captions are encoded by it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmm.files.weights import PICKLE_SUFFIXES
from dmm.formats.lora import lora_file
from dmm.formats.tensors import read_header
from dmm.models.adapters import Adapter
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.models.text_adapters import text_difference
from dmm.recipes.recipe import Recipe
from dmm.training.merge_plan import Plan

_logger = logging.getLogger(__name__)

# what the names of text encoders' layers have in them, in any layout; some others may have it, too
_OF_TEXT = ("lora_te", "text", "encoder.layers.", "clip_")

Text = Mapping[str, Mapping[str, Adapter]]
"""By style, what it changes of each text encoder; styles that change none are not in it."""


def text_of_styles(recipe: Recipe, plan: Plan, base: Any) -> Text:
    """What the recipe's styles change of the base's text encoders.

    It hangs on the models alone, so that a run that goes on finds the same; of a start that has the styles, it is the
    start's.

    Args:
        base: the pipeline, none of whose styles is set.
    """
    if recipe.kind == "controlnet" or not recipe.styles.has_adapters:
        return {}
    names = [teacher.name for teacher in recipe.teachers]
    if plan.style_prompts is not None and all(name in plan.style_prompts.adapters for name in names):
        earlier = {name: plan.style_prompts.adapters[name].text for name in names}
        return {name: one for name, one in earlier.items() if one}
    rank, found = recipe.styles.text_rank, {}
    for teacher, source in zip(recipe.teachers, plan.teachers, strict=True) if rank else ():
        if not _may_differ(source, plan.base):
            continue
        pipeline = open_pipeline(source, name=f"teacher '{teacher.name}'")
        text = text_difference(pipeline, base, rank)
        del pipeline  # before the next one is opened
        if text is None:
            _logger.warning(
                "teacher '%s': its text encoder has another shape than the base's, so the style reads by the base's.",
                teacher.name,
            )
        elif text:
            found[teacher.name] = text
    return found


def _may_differ(source: ModelSource, base: ModelSource) -> bool:
    """Whether a teacher's text encoders may be others than the base's: not of LoRAs on it that are of a denoiser."""
    return source.model != base.model or any(_may_change_text(path) for path, _ in source.loras)


def _may_change_text(path: Path) -> bool:
    file = lora_file(path)
    if file.suffix in PICKLE_SUFFIXES:
        return True
    return any(part in name for name in read_header(file).tensors for part in _OF_TEXT)
