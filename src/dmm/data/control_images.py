"""What ControlNets are shown of each image: read from the data's own columns, or made of the images; cached."""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dmm.data.conditions import maker_named
from dmm.data.encoding import decode_latents
from dmm.data.images import READER, CaptionedImages, ImageFolder, load_image
from dmm.data.keys import digest_vae, key_of
from dmm.data.rows import ALONE, Place, Rows, cached_rows
from dmm.errors import UserError
from dmm.files.picture_reader import open_picture

SHOWN = "controlnet_cond"
"""The ControlNet's argument."""


@dataclass(frozen=True)
class Condition:
    """What a ControlNet is shown of an image; one of the two is given."""

    column: str | None = None
    """The key of ``metadata.jsonl`` that names the condition image's file."""
    make: str | None = None
    """The function that makes it, see :func:`dmm.data.conditions.maker_named`."""

    def rows(
        self,
        source: Any,
        latents: Rows,
        vae: Any,
        size: int,
        cache: Path,
        progress: Callable[[float], object],
        place: Place = ALONE,
    ) -> Rows:
        """The condition images of all rows of the training data.

        Args:
            source: folder or dataset of images, or what tells how models paint them.
            latents: of the data; read where models have painted them.
            size, cache, progress, place: see :func:`dmm.data.encoding.encode_latents`.
        Returns: M rows of ``controlnet_cond``, (3, size, size) uint8.
        Raises: UserError: an image has none, one is damaged, or what makes them makes none.
        """
        if self.column is not None:
            return read_column(source, self.column, size, cache, progress, place)
        assert self.make is not None
        if hasattr(source, "digests"):
            return make_from_images(source, self.make, size, cache, progress, place)
        return make_from_latents(latents, vae, self.make, cache, progress, place)


def read_column(
    images: ImageFolder, key: str, size: int, cache: Path, progress: Callable[[float], object], place: Place = ALONE
) -> Rows:
    """The condition images that a folder's ``metadata.jsonl`` names under a key, cut as the images are.

    Args:
        size, cache, progress, place: see :func:`dmm.data.encoding.encode_latents`.
    Returns: M rows of ``controlnet_cond``, (3, size, size) uint8.
    Raises: UserError: an image has none, or one is damaged.
    """
    paths = images.column(key)

    def make(rows: range) -> dict[str, Tensor]:
        found = [open_picture(paths[row]) for row in rows]
        progress(len(rows))
        return _stored([ImageOps.fit(one, (size, size), Image.Resampling.LANCZOS) for one in found])

    def name(rows: range) -> str:
        digests = [hashlib.sha256(paths[row].read_bytes()).hexdigest() for row in rows]
        return key_of(reader=READER, size=size, conditions=digests)

    return cached_rows(cache / "conditions", len(paths), name, make, progress, place)


def make_from_images(
    images: CaptionedImages,
    maker: str,
    size: int,
    cache: Path,
    progress: Callable[[float], object],
    place: Place = ALONE,
) -> Rows:
    """Condition images that a function makes of the images as they are trained on.

    Args:
        maker: see :func:`dmm.data.conditions.maker_named`.
        size, cache, progress, place: see :func:`dmm.data.encoding.encode_latents`.
    Returns: as :func:`read_column`.
    Raises: UserError: there is no such function, or what it makes is no picture of the same size.
    """
    digests = images.digests(cache)

    def make(rows: range) -> dict[str, Tensor]:
        found = _made(maker, [load_image(images, row, (size, size)) for row in rows])
        progress(len(rows))
        return found

    def name(rows: range) -> str:
        return key_of(reader=READER, size=size, maker=_identity(maker), images=digests[rows.start : rows.stop])

    return cached_rows(cache / "conditions", len(digests), name, make, progress, place)


def make_from_latents(
    latents: Rows,
    vae: Any,
    maker: str,
    cache: Path,
    progress: Callable[[float], object],
    place: Place = ALONE,
) -> Rows:
    """Condition images that a function makes of pictures that models have painted.

    Args:
        latents: rows of ``latents``, of which this process may read those that its place gives it.
        vae: shows them.
        maker, cache, progress, place: see :func:`make_from_images`.
    Returns, raises: as :func:`make_from_images`.
    """
    decoder = digest_vae(vae)
    # a shard is named by all that its latents were made from
    made_from = [shard.path.stem for shard in latents.shards for _ in range(shard.num_rows)]

    def make(rows: range) -> dict[str, Tensor]:
        with torch.no_grad():
            pictures = decode_latents(vae, latents.read(torch.arange(rows.start, rows.stop))["latents"])
        progress(len(rows))
        return _made(maker, pictures)

    def name(rows: range) -> str:
        shards = list(dict.fromkeys(made_from[rows.start : rows.stop]))
        return key_of(vae=decoder, maker=_identity(maker), latents=shards, rows=[rows.start, rows.stop])

    return cached_rows(cache / "conditions", len(latents), name, make, progress, place)


def _made(name: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    maker = maker_named(name)
    found = []
    for picture in pictures:
        one = maker(picture)
        if not isinstance(one, Image.Image) or one.size != picture.size:
            told = f"a picture of {one.size}" if isinstance(one, Image.Image) else f"a {type(one).__name__}"
            raise UserError(f"'{name}' made {told} of a picture of {picture.size}; one of that size was expected.")
        found.append(one.convert("RGB"))
    return _stored(found)


def _stored(pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return {SHOWN: torch.from_numpy(pixels).permute(0, 3, 1, 2)}


def _identity(name: str) -> str:
    """A function by its name and its text, so that another version makes its images anew."""
    try:
        text = inspect.getsource(maker_named(name))
    except (OSError, TypeError):  # a built-in one has no text
        text = ""
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()}"
