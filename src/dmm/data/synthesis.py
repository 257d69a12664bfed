"""Images that the teachers paint from prompts, where there are no others to learn on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm.data.encoding import check_rows, encode_images
from dmm.data.keys import digest_denoiser, digest_tensors, digest_text_encoders, digest_vae, key_of, public_config
from dmm.data.rows import ALONE, Place, Rows, cached_rows
from dmm.errors import UserError
from dmm.families import denoiser_of
from dmm.models.conditioning import check_clip_skip, takes_zeros, tokenize
from dmm.pipeline.samplers import DEFAULT_SAMPLER, SAMPLERS, check_settings
from dmm.pipeline.sampling import picture_size, sample, sample_latents


@dataclass(frozen=True)
class Synthesis:
    """How the teachers paint a set of images."""

    prompts: Sequence[str]
    """What of; they are used over and over until there are enough images."""
    count: int
    """Of images, all teachers' together: they share them evenly, the first ones painting one more where they must."""
    steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 7.0
    """Classifier-free guidance; 1 is none."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    sampler: str = DEFAULT_SAMPLER
    """A key of :data:`dmm.pipeline.samplers.SAMPLERS`."""
    seed: int = 0
    """Of the whole set; another one shares no image with it."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("There are no prompts to synthesise images from; at least one is needed.")
        if self.count < 1:
            raise UserError(f"The count of images to synthesise must be at least 1, not {self.count}.")
        if self.sampler not in SAMPLERS:
            raise UserError(f"There is no sampler '{self.sampler}'; choose from {', '.join(SAMPLERS)}.")
        check_settings(steps=self.steps, guidance_scale=self.guidance_scale, negative_prompt=self.negative_prompt)


@dataclass(frozen=True)
class Share:
    """What one teacher paints: picture i is of ``prompts[i]``, from ``seeds[i]``."""

    prompts: Sequence[str]
    seeds: Sequence[int]


def share_out(synthesis: Synthesis, num_teachers: int) -> list[Share]:
    """Who paints what.

    The prompts are shuffled once, so that a file in some order does not give one teacher all the cats, and
    then dealt in turn, one teacher after the other: a teacher that paints as many images as there are prompts
    paints each once, and teachers that paint fewer paint different ones. No two images share a seed.

    Returns: one share for each teacher.
    Raises: UserError: fewer images than teachers.
    """
    count, prompts = synthesis.count, synthesis.prompts
    if count < num_teachers:
        raise UserError(f"{num_teachers} teachers cannot share {count} images to synthesise: ask for one each or more.")
    order = np.random.default_rng(synthesis.seed).permutation(len(prompts))
    seeds = image_seeds(synthesis.seed, count)
    portions = np.array_split(np.arange(count), num_teachers)
    return [
        Share([prompts[order[image % len(prompts)]] for image in portion], [seeds[image] for image in portion])
        for portion in portions
    ]


def image_seeds(seed: int, count: int) -> list[int]:
    """The seeds, in [0, 2**32), of a set's images: all different, as many as there are.

    Two sets of different seeds begin at unrelated places of that range, so that they have none in common but
    by a chance of about their joint count in 2**32.
    """
    first = int.from_bytes(hashlib.sha256(f"{seed}".encode()).digest()[:4], "big")
    return [(first + index) % 2**32 for index in range(count)]


def synthesize(
    pipeline: Any,
    vae: Any,
    share: Share,
    synthesis: Synthesis,
    size: int,
    cache: Path,
    progress: Callable[[float], object],
    place: Place = ALONE,
    *,
    clip_skip: int | None = None,
) -> Rows:
    """Latents of the images that one teacher paints, as the student's VAE would encode them.

    The sampler's own latents are taken where the teacher has the student's VAE. Another VAE's mean other
    images: what it decodes is encoded anew.

    Args:
        pipeline: the teacher, on the device it shall run on.
        vae: the student's.
        size: pixels a side.
        cache: folder of the cache.
        progress: called with numbers of images, which add up to those that this process sees to.
        place: this process's, among those that paint together; see :func:`dmm.data.rows.cached_rows`.
        clip_skip: of the teacher, see :func:`dmm.models.conditioning.encode_tokens`.
    Returns: rows of ``latents``, as :func:`dmm.data.encoding.encode_latents` makes them.
    Raises: UserError: the size does not suit the teacher, or the arithmetic overflowed.
    """
    picture_size(pipeline, size, size)
    check_clip_skip(pipeline, clip_skip)
    own_vae, students_vae = digest_vae(pipeline.vae), digest_vae(vae)
    settings: dict[str, Any] = {
        "steps": synthesis.steps,
        "guidance_scale": synthesis.guidance_scale,
        "negative_prompt": synthesis.negative_prompt,
        "width": size,
        "height": size,
        "sampler": synthesis.sampler,
        "clip_skip": clip_skip,
    }
    made_by = {
        "unet": digest_denoiser(denoiser_of(pipeline)),
        "text_encoders": digest_text_encoders(pipeline),
        "zeros": takes_zeros(pipeline),
        "scheduler": public_config(pipeline.scheduler),
        "vaes": None if own_vae == students_vae else [own_vae, students_vae],
        **settings,
    }

    def key(rows: range) -> str:
        tokens = tokenize(pipeline, [synthesis.negative_prompt, *share.prompts[rows.start : rows.stop]])
        seeds = share.seeds[rows.start : rows.stop]
        return key_of(tokens=digest_tensors(tokens), seeds=list(seeds), **made_by)

    def make(rows: range) -> dict[str, Tensor]:
        prompts, seeds = share.prompts[rows.start : rows.stop], share.seeds[rows.start : rows.stop]
        if own_vae == students_vae:
            latents = torch.stack(list(sample_latents(pipeline, prompts, seeds, progress=progress, **settings)))
        else:
            latents = encode_images(vae, list(sample(pipeline, prompts, seeds, progress=progress, **settings)))
        stored = latents.half()
        check_rows(stored, [f"'{prompt}'" for prompt in prompts], "latents", vae.dtype)
        return {"latents": stored}

    return cached_rows(cache / "synthesised", len(share.prompts), key, make, progress, place)
