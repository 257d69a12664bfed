"""Folders of images, and what modules are asked for."""

import json

import numpy as np
from PIL import Image


def write_folder(folder, captions, draw=lambda index: Image.new("RGB", (20, 20), (index * 20, 0, 0))):
    """A folder of PNGs, one for each caption."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, caption in enumerate(captions):
        draw(index).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def noise(*shape):
    """An image of random pixels, the same for each shape."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def count_calls(module):
    """What a module is called with from now on, by batch size."""
    calls = []
    module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(args[0])), with_kwargs=True)
    return calls
