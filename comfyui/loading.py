"""Merged models in ComfyUI's folder ``models/diffusers``, opened by ComfyUI's own loaders."""

import json
from pathlib import Path
from typing import Any

import comfy.model_sampling
import comfy.sd
import comfy.utils
import folder_paths

from .side_car import STYLES, style_names

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
TEXT_WEIGHTS = ("model.safetensors", "model.fp16.safetensors")
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""The noise that ComfyUI takes every Stable Diffusion model for."""


def merged_models() -> dict[str, Path]:
    """The merged models that ComfyUI can see, by their path under ``models/diffusers``."""
    found: dict[str, Path] = {}
    for place in map(Path, folder_paths.get_folder_paths("diffusers")):
        for index in sorted(place.rglob("model_index.json")):
            if (index.parent / STYLES / "config.json").is_file():
                found.setdefault(index.parent.relative_to(place).as_posix(), index.parent)
    return found


def all_style_names() -> list[str]:
    """The styles of all of them, for a list to choose from."""
    names: dict[str, None] = {}
    for model in merged_models().values():
        names.update(dict.fromkeys(style_names(model)))
    return list(names)


def load_parts(model: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of a stock pipeline's folder.

    Raises: ValueError: a file is missing, or its noise schedule is one that ComfyUI does not know.
    """
    unet = {}
    for file in _weight_files(model / "unet", WEIGHTS):
        unet.update(comfy.utils.load_torch_file(str(file)))
    patcher = comfy.sd.load_diffusion_model_state_dict(unet)
    if patcher is None:
        raise ValueError(f"ComfyUI does not know the architecture of {model / 'unet'}.")
    _follow_schedule(patcher, model / "scheduler" / "scheduler_config.json")
    texts = [folder for folder in (model / "text_encoder", model / "text_encoder_2") if folder.is_dir()]
    clip = comfy.sd.load_clip(
        [str(file) for folder in texts for file in _weight_files(folder, TEXT_WEIGHTS)],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
    )
    (vae,) = _weight_files(model / "vae", WEIGHTS)
    return patcher, clip, comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae)))


def _weight_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / Path(part).name for part in sorted(set(parts))]
    raise ValueError(f"{folder} has no {names[0]}: copy the whole folder of the merged model again.")


def _follow_schedule(patcher: Any, path: Path) -> None:
    """Tell ComfyUI what a folder's weights predict, and of what noise: weights alone do not say."""
    config = json.loads(path.read_text(encoding="utf-8"))
    other = {name: config.get(name) for name, value in SCHEDULE.items() if config.get(name, value) != value}
    kind = config.get("prediction_type", "epsilon")
    if other or config.get("trained_betas") is not None or kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{path}: the model predicts {kind} of a noise schedule of its own ({other or 'trained_betas'}), which "
            "ComfyUI's loader cannot be told."
        )
    ends_in_noise = bool(config.get("rescale_betas_zero_snr"))
    if kind == "v_prediction" or ends_in_noise:
        prediction = comfy.model_sampling.V_PREDICTION if kind == "v_prediction" else comfy.model_sampling.EPS
        sampling = type("DMMSampling", (comfy.model_sampling.ModelSamplingDiscrete, prediction), {})
        patcher.add_object_patch("model_sampling", sampling(patcher.model.model_config, zsnr=ends_in_noise))
