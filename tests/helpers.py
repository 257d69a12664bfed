"""Changing model files, comparing what they open to, painting with it; processes that are killed."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rewrite(source: Path, target: Path, change, metadata: dict[str, str] | None = None) -> Path:
    """Write ``source``'s tensors to ``target`` after ``change(tensors)``; the metadata stays unless given."""
    tensors = load_file(source)
    change(tensors)
    with safe_open(source, framework="pt") as file:
        kept = file.metadata() or {}
    save_file(tensors, target, kept if metadata is None else metadata)
    return target


def copy_folder(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def same_weights(one, other) -> bool:
    """Whether two pipelines' weights are equal bit for bit."""
    modules = [name for name, part in one.components.items() if isinstance(part, torch.nn.Module)]
    for name in modules:
        left, right = getattr(one, name).state_dict(), getattr(other, name).state_dict()
        if left.keys() != right.keys() or not all(left[key].equal(right[key]) for key in left):
            return False
    return bool(modules)


def paint(pipe, prompts="a cat", *, num_images=1, guidance_scale=7.0, steps=3, **inputs):
    """Pixels, as (N, H, W, 3) integers; image i is seeded by i."""
    count = num_images * (1 if prompts is None or isinstance(prompts, str) else len(prompts))
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompts,
        generator=generators if count > 1 else generators[0],
        num_images_per_prompt=num_images,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        **inputs,
    ).images
    return np.stack([np.asarray(image, dtype=int) for image in images])


def in_child(work):
    """Do something in a process of its own, which is killed; returns the signal that did."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
