"""Images as latents and captions as embeddings, made once and cached.

Both are stored in float16 whatever the training's precision: one cache serves all, and half the bytes are
read. Its eleven bits are more than bfloat16's eight, and a rounded latent is the latent of an image that no
eye tells from the other; student and teacher see the same one. Embeddings that may exceed float16, those of language
models and of T5, are stored in bfloat16.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmm.data.images import READER, CaptionedImages, load_image
from dmm.data.keys import digest_tensors, digest_text_encoders, digest_vae, key_of
from dmm.data.rows import ALONE, Place, Rows, cached_rows
from dmm.errors import UserError
from dmm.families import family_of
from dmm.maths.buckets import Size
from dmm.models.conditioning import check_clip_skip, encode_captions, takes_zeros, tokenize
from dmm.pipeline.samplers import check_multiple


def encode_latents(
    vae: Any,
    images: CaptionedImages,
    size: Size,
    cache: Path,
    progress: Callable[[float], object],
    place: Place = ALONE,
) -> Rows:
    """Latents of M images.

    Args:
        vae: of the student, on the device it shall run on.
        size: width and height in pixels.
        cache: folder of the cache.
        progress: called with numbers of images, which add up to those that this process sees to.
        place: this process's, among those that share the work; see :func:`dmm.data.rows.cached_rows`.
    Returns: M rows of ``latents``, (C, height / f, width / f) for a VAE that shrinks by f.
    Raises: UserError: the size is no multiple of f, an image is damaged, or the arithmetic overflowed.
    """
    for side in size:
        check_size(vae, side)
    vae_digest, image_digests = digest_vae(vae), images.digests(cache)
    batch_size = max(1, min(64, 4 * 512 * 512 // (size[0] * size[1])))

    told = size[0] if size[0] == size[1] else list(size)  # squares are cached by their side

    def make(rows: range) -> dict[str, Tensor]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            loaded = pool.map(lambda row: load_image(images, row, size), rows)  # goes on while the VAE computes
            latents = []
            for start in range(0, len(rows), batch_size):
                batch = [image for image, _ in zip(loaded, rows[start : start + batch_size], strict=False)]
                latents.append(encode_images(vae, batch))
                progress(len(batch))
        stored = torch.cat(latents).half()
        check_rows(stored, [images.name(row) for row in rows], "latents", vae.dtype)
        return {"latents": stored}

    return cached_rows(
        cache / "latents",
        len(image_digests),
        lambda rows: key_of(vae=vae_digest, size=told, reader=READER, images=image_digests[rows.start : rows.stop]),
        make,
        progress,
        place,
    )


def check_size(vae: Any, size: int) -> None:
    """Refuse a size, in pixels a side, that a VAE cannot shrink evenly.

    Raises: UserError: naming the nearest sizes that it can.
    """
    check_multiple("size", size, 2 ** (len(vae.config.block_out_channels) - 1))


@torch.no_grad()
def encode_images(vae: Any, images: Sequence[Image.Image]) -> Tensor:
    """The latents that a VAE holds most likely: the mode of its posterior, in the units that its denoiser works in.

    Args:
        images: B, RGB, of one size.
    Returns: (B, C, H / f, W / f), float32, on the CPU.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with _never_in_float16(vae):
        pixels = (pixels.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode().float().cpu()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> list[Image.Image]:
    """The pictures that a VAE makes of latents in the units that its denoiser works in: :func:`encode_images` undone.

    Args:
        latents: (B, C, H / f, W / f).
    Returns: B, RGB.
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    images = []
    with _never_in_float16(vae):
        for one in latents:  # of whole size, they take more memory than anything before
            inner = (one[None] / vae.config.scaling_factor + shift).to(vae.device, vae.dtype)
            pixels = (vae.decode(inner).sample[0].float() * 127.5 + 127.5).round().clamp(0, 255)
            images.append(Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()))
    return images


@contextmanager
def _never_in_float16(vae: Any) -> Iterator[None]:
    """Within the block, a VAE that may overflow in half precision computes in float32."""
    dtype = vae.dtype
    is_unsafe = dtype == torch.float16 and vae.config.force_upcast
    if is_unsafe:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if is_unsafe:
            vae.to(dtype)  # what came from float16 goes back to it whole


def encode_texts(
    pipeline: Any,
    captions: Sequence[str],
    cache: Path,
    progress: Callable[[float], object],
    place: Place = ALONE,
    *,
    clip_skip: int | None = None,
) -> Rows:
    """What a pipeline's denoiser reads of U captions.

    Two pipelines whose text encoders are equal and make equal tokens of the captions share what is cached.

    Args:
        progress: called with numbers of captions, which add up to those that this process sees to.
        place: this process's, among those that share the work; see :func:`dmm.data.rows.cached_rows`.
        clip_skip: see :func:`dmm.models.conditioning.encode_tokens`.
    Returns: U rows of the tensors of :func:`dmm.models.conditioning.encode_captions`.
    Raises: UserError: the arithmetic overflowed, or the text encoder has not so many layers to skip.
    """
    check_clip_skip(pipeline, clip_skip)
    kept = torch.bfloat16 if family_of(pipeline).has_wide_states else torch.float16
    encoders = digest_text_encoders(pipeline)

    def key(rows: range) -> str:
        tokens = digest_tensors(tokenize(pipeline, captions[rows.start : rows.stop]))
        return key_of(text_encoders=encoders, clip_skip=clip_skip, tokens=tokens, zeros=takes_zeros(pipeline))

    def make(rows: range) -> dict[str, Tensor]:
        texts = captions[rows.start : rows.stop]
        encoded = encode_captions(pipeline, texts, clip_skip)
        stored = {name: tensor.to(kept) if tensor.is_floating_point() else tensor for name, tensor in encoded.items()}
        for tensor in stored.values():
            check_rows(tensor, [f"'{text}'" for text in texts], "embedding", pipeline.text_encoder.dtype)
        progress(len(rows))
        return stored

    return cached_rows(cache / "texts", len(captions), key, make, progress, place)


def check_rows(tensor: Tensor, names: Sequence[str], what: str, dtype: torch.dtype) -> None:
    """Refuse what overflowed, before it is cached and taught.

    Args:
        tensor: (B, ...), as it will be stored.
        names: what errors call the rows.
        what: the tensor's name.
        dtype: in which it was computed.
    Raises: UserError: naming the first row that holds NaN or infinity.
    """
    finite = tensor.reshape(len(tensor), -1).isfinite().all(1)
    if not finite.all():
        raise UserError(
            f"{names[int(finite.int().argmin())]}: the {what} came out as NaN or infinite, computed in "
            f"{str(dtype).removeprefix('torch.')}. Some models overflow in float16: use bf16 or fp32. If fp32 does the "
            "same, the model is damaged."
        )
