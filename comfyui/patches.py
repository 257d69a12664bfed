"""What puts a style on ComfyUI's model: a patch of the embedding of time, and LoRA patches for what changes weights.

The patch holds one vector for each part of a style over time. It copies no weights, and being no wrapper of the whole
model it leaves room for others.
"""

from collections.abc import Sequence
from typing import Any

import comfy.hooks
import comfy.lora
from torch import Tensor

from .styles import Style

EMB_PATCH = "emb_patch"
OF_TEXT = ("lora_te", "text_encoders.")
"""What names begin with of what a style changes of text encoders."""
ENDINGS = (".lora_down.weight", ".lora_up.weight", ".alpha", ".diff_b", ".diff")


class StylePatch:
    """Adds a style's term to the embedding of time, as ``set_model_emb_patch`` calls it.

    Args:
        style: what to paint in.
        is_regional: it is of a conditioning, and so takes the place of the style of the whole model.
    """

    def __init__(self, style: Style, *, is_regional: bool = False) -> None:
        self.is_regional = is_regional
        self.adapts = bool(style.adapted)
        self._ends = [part.end for part in style.parts]
        self._terms: Sequence[Tensor | None] = [style.styles.term(part.weights) for part in style.parts]

    def __deepcopy__(self, memo: dict[int, Any]) -> "StylePatch":
        return self  # never changed; ComfyUI copies all that is on a model with each clone

    def __call__(self, emb: Tensor, model_channels: int, transformer_options: dict[str, Any]) -> Tensor:
        """Map (B, D) to (B, D).

        Raises: ValueError: the style belongs to a model of another width, or two styles that change weights meet.
        """
        if not self.is_regional:
            patches = transformer_options["patches"][EMB_PATCH]
            regional = [one for one in patches if isinstance(one, StylePatch) and one.is_regional]
            if regional:
                if self.adapts or any(one.adapts for one in regional):
                    raise ValueError(
                        "A region has a style, and so has the whole model, and they change weights, which would add "
                        "up. Take 'DMM apply style' away, and give what no region covers a 'DMM style by region' too."
                    )
                return emb
        term = self._terms[_part_at(self._ends, transformer_options)]
        if term is None:
            return emb
        if emb.shape[-1] != len(term):
            raise ValueError(
                f"The style is {len(term)} wide, the model's embedding of time {emb.shape[-1]}: they are of different "
                "models."
            )
        return emb + term.to(emb)


def _part_at(ends: Sequence[float], transformer_options: dict[str, Any]) -> int:
    """Which part is painted now: step i of n is at i / n."""
    if len(ends) == 1:
        return 0
    sigmas, now = transformer_options["sample_sigmas"], transformer_options["sigmas"][0]
    # what a sampler of higher order asks between two steps belongs to the earlier one
    step = max(int((sigmas[:-1] >= now.to(sigmas) * (1 - 1e-5)).sum()) - 1, 0)
    fraction = step / (len(sigmas) - 1)
    return next(i for i, end in enumerate(ends) if fraction < end)


def apply_style(model: Any, style: Style) -> Any:
    """A clone of a model that paints in a style.

    Raises: ValueError: it has one already; the style is of another model; or weights would change over time.
    """
    styled = model.clone()
    patches = styled.model_options["transformer_options"].get("patches", {}).get(EMB_PATCH, [])
    if any(isinstance(one, StylePatch) for one in patches):
        raise ValueError("This model has a DMM style on it already. Connect the MODEL that the loader gives.")
    if style.adapted:
        if len(style.parts) > 1:
            raise ValueError(
                "These styles change weights, which ComfyUI can do over time for a conditioning only: use 'DMM style "
                "by region', without a mask, on both conditionings."
            )
        for name, weight in style.parts[0].weights.items():
            lora = _of_model(style, name)
            if lora and weight:
                keys = comfy.lora.model_lora_keys_unet(styled.model, {})
                styled.add_patches(_patches_of(keys, lora, name), weight)
    styled.set_model_emb_patch(StylePatch(style))
    return styled


def read_in_style(clip: Any, style: Style) -> Any:
    """A clone of text encoders that reads in a style: as it did, where the style's teacher read as the base does.

    A style over time is read in as it begins: a prompt is read once.

    Raises: ValueError: the style is of another model.
    """
    styled = clip.clone()
    for name, weight in style.parts[0].weights.items():
        lora = {key: tensor for key, tensor in style.styles.lora(name).items() if key.startswith(OF_TEXT)}
        if lora and weight:
            keys = comfy.lora.model_lora_keys_clip(styled.cond_stage_model, {})
            styled.add_patches(_patches_of(keys, lora, name), weight)
    return styled


def _of_model(style: Style, name: str) -> dict[str, Tensor]:
    """What a style changes of the model that paints."""
    return {key: tensor for key, tensor in style.styles.lora(name).items() if not key.startswith(OF_TEXT)}


def _patches_of(keys: dict[str, Any], lora: dict[str, Tensor], style: str) -> dict[str, Any]:
    """A LoRA as patches of ComfyUI's weights, all of it: what would be left out unseen is an error.

    Args:
        keys: of the layers that there are, by the names that LoRAs have for them.
    """
    layers = {next(name.removesuffix(end) for end in ENDINGS if name.endswith(end)) for name in lora}
    strange = sorted(layers - keys.keys())
    if strange:
        raise ValueError(
            f"The style '{style}' changes {strange[0]} and {len(strange) - 1} more layers that this model does not "
            "have: it is of another model."
        )
    return comfy.lora.load_lora(lora, keys)


def style_hooks(style: Style) -> Any:
    """A style as hooks of a conditioning; where it changes weights over time, by ComfyUI's keyframes."""
    hooks = comfy.hooks.HookGroup()
    patch = {"patches": {EMB_PATCH: [StylePatch(style, is_regional=True)]}}
    # a hook of a conditioning alone: one for all would put the style on the whole picture
    hooks.add(comfy.hooks.TransformerOptionsHook(patch, hook_scope=comfy.hooks.EnumHookScope.HookedOnly))
    for name in style.adapted:
        group = comfy.hooks.create_hook_lora(_of_model(style, name), 1.0, 0.0)
        keyframes, start = comfy.hooks.HookKeyframeGroup(), 0.0
        for part in style.parts:
            keyframes.add(comfy.hooks.HookKeyframe(part.weights.get(name, 0.0), start_percent=start))
            start = part.end
        group.set_keyframes_on_hooks(keyframes)
        for hook in group.hooks:
            hooks.add(hook)
    return hooks
