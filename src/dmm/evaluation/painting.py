"""The pictures that an evaluation looks at: which ones, and painting those that no earlier evaluation has.

A picture's seed is a function of the evaluation's seed, the batch, the style, the prompt and how often that
prompt came before: student and teacher start from the same noise, and what was painted once is found again when
prompts are added or more pictures are asked for.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm.data.keys import digest_denoiser, digest_tensors, digest_text_encoders, digest_vae, key_of, public_config
from dmm.data.rows import Place, Rows, cached_rows
from dmm.data.synthesis import Share
from dmm.families import denoiser_of
from dmm.models.conditioning import takes_zeros, tokenize
from dmm.pipeline.samplers import DEFAULT_SAMPLER, check_settings
from dmm.pipeline.sampling import picture_size, sample


@dataclass(frozen=True)
class Painting:
    """How pictures are painted, by student and teachers alike."""

    steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 7.0
    """Classifier-free guidance; 1 is none."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    width: int | None = None
    """Pixels, by default the model's own."""
    height: int | None = None
    """Likewise."""
    sampler: str = DEFAULT_SAMPLER
    """A key of :data:`dmm.pipeline.samplers.SAMPLERS`."""
    precision: str = "fp32"
    """``fp32``, ``fp16`` or ``bf16``."""

    def __post_init__(self) -> None:
        check_settings(steps=self.steps, guidance_scale=self.guidance_scale, negative_prompt=self.negative_prompt)

    def dtype(self, device: torch.device) -> torch.dtype:
        """Of the weights. On a CPU bf16 is autocast from float32: faster than weights of it, and more exact."""
        if device.type == "cpu" and self.precision == "bf16":
            return torch.float32
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]


def share_of(prompts: Sequence[str], num_images: int, style: str, batch: str, seed: int) -> Share:
    """The pictures of one batch in one style: every prompt in turn, over and over.

    Args:
        batch: name of the batch; two of different names share no noise but by chance.
        seed: of the evaluation.
    """
    painted = [prompts[place % len(prompts)] for place in range(num_images)]
    seeds, before = [], Counter[str]()
    for prompt in painted:
        text = "\0".join((str(seed), batch, style, prompt, str(before[prompt])))
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
        before[prompt] += 1
    return Share(painted, seeds)


def paint(
    pipeline: Any,
    share: Share,
    painting: Painting,
    cache: Path,
    progress: Callable[[float], object],
    place: Place,
    *,
    clip_skip: int | None = None,
) -> Rows:
    """Pictures by one pipeline in the style that is set on it, as far as the cache has none.

    Args:
        pipeline: on the device it shall run on, its weights in the dtype that ``painting`` tells.
        cache: folder of the cache.
        progress: called with numbers of pictures, which add up to those that this process sees to.
        place: this process's, among those that paint together.
        clip_skip: see :func:`dmm.models.conditioning.encode_tokens`.
    Returns: rows of ``images``, (3, H, W), 8 bits, whole once all processes are done.
    Raises: UserError: the size does not suit the model, or the arithmetic overflowed.
    """
    width, height = picture_size(pipeline, painting.width, painting.height)
    settings = {**asdict(painting), "width": width, "height": height, "clip_skip": clip_skip}
    precision = settings.pop("precision")
    made_by = {
        "unet": digest_denoiser(denoiser_of(pipeline)),
        "text_encoders": digest_text_encoders(pipeline),
        "zeros": takes_zeros(pipeline),
        "vae": digest_vae(pipeline.vae),
        "scheduler": public_config(pipeline.scheduler),
        "precision": precision,
        **settings,
    }
    is_autocast = precision == "bf16" and denoiser_of(pipeline).dtype == torch.float32

    def key(rows: range) -> str:
        tokens = tokenize(pipeline, [painting.negative_prompt, *share.prompts[rows.start : rows.stop]])
        seeds = list(share.seeds[rows.start : rows.stop])
        return key_of(kind="pictures", tokens=digest_tensors(tokens), seeds=seeds, **made_by)

    def make(rows: range) -> dict[str, Tensor]:
        prompts, seeds = share.prompts[rows.start : rows.stop], share.seeds[rows.start : rows.stop]
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=is_autocast):
            pictures = list(sample(pipeline, prompts, seeds, progress=progress, **settings))
        pixels = np.stack([np.asarray(picture) for picture in pictures])
        return {"images": torch.from_numpy(pixels).permute(0, 3, 1, 2)}

    return cached_rows(cache / "pictures", len(share.prompts), key, make, progress, place)
