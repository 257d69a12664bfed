"""Images with captions, read from a folder or a dataset and brought to one size."""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps

from dmm.data.captions import METADATA, read_captions, read_column
from dmm.data.keys import key_of
from dmm.errors import UserError
from dmm.files.outputs import new_file
from dmm.files.picture_reader import open_picture, picture_size
from dmm.maths.buckets import Size, nearest_bucket

READER = 2
"""Raised where images come to be read as other pixels, so that what was cached of them is made again."""


class CaptionedImages(Protocol):
    """M images and their captions; images are read when they are asked for."""

    captions: Sequence[str]

    def name(self, index: int) -> str:
        """What an error calls the image."""

    def read(self, index: int) -> bytes:
        """The image as it is stored."""

    def digests(self, cache: Path) -> list[str]:
        """Hex sha256 of every image's bytes.

        Args:
            cache: where they may be remembered.
        """


class ImageFolder:
    """A folder of captioned images, in the conventions of :mod:`dmm.data.captions`.

    Raises: UserError: no such folder, or something is wrong with its captions.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser()
        if not self._folder.is_dir():
            raise UserError(f"{folder}: no such folder of images. Check the path.")
        pairs = read_captions(self._folder)
        self._paths = [path for path, _ in pairs]
        self.captions: Sequence[str] = [caption for _, caption in pairs]

    def name(self, index: int) -> str:
        """What an error calls the image."""
        return str(self._paths[index])

    def column(self, key: str) -> list[Path]:
        """The file that ``metadata.jsonl`` names under a key, of every image.

        Raises: UserError: an image has none, or there is no such file.
        """
        found = read_column(self._folder, key)
        missing = [path for path in self._paths if path not in found]
        if missing:
            raise UserError(
                f"{missing[0]}: no {METADATA} names its '{key}'; {len(missing)} of the {len(self._paths)} images have "
                "none. Add it to their lines, or have it made of the images: {make: edges}."
            )
        return [found[path] for path in self._paths]

    def read(self, index: int) -> bytes:
        """The image as it is stored."""
        try:
            return self._paths[index].read_bytes()
        except OSError as error:
            raise UserError(f"{self._paths[index]} could not be read: {error.strerror}.") from error

    def digests(self, cache: Path) -> list[str]:
        """Hex sha256 of every image's bytes.

        They are remembered in the cache beside size and time of change, as git's index does: a file in which neither
        changed is not read again, or every run would begin by reading the whole set.
        """
        memory = cache / "digests" / f"{key_of(folder=str(self._folder.resolve()))}.json"
        known = _read_memory(memory)

        def remember(index: int) -> tuple[str, list[Any]]:
            path = self._paths[index]
            status = path.stat()
            entry = known.get(str(path))
            if entry is None or entry[:2] != [status.st_size, status.st_mtime_ns]:
                entry = [status.st_size, status.st_mtime_ns, hashlib.sha256(self.read(index)).hexdigest()]
            return str(path), entry

        with ThreadPoolExecutor() as pool:
            num_images = len(self._paths)
            portions = [range(num_images)[start : start + 4096] for start in range(0, num_images, 4096)]
            entries = [entry for portion in portions for entry in pool.map(remember, portion)]
        if dict(entries) != known:
            with new_file(memory, overwrite=True) as temporary:
                temporary.write_text(json.dumps(dict(entries)), encoding="utf-8")
        return [digest for _, (_, _, digest) in entries]


class ImageDataset:
    """A dataset of the package ``datasets``, with an image column ``image`` and captions in ``text``.

    Args:
        dataset: an id on the hub, or a folder that ``load_dataset`` or ``load_from_disk`` takes; its split ``train``.
    Raises: UserError: the package is not installed, or there is no such dataset, split or column.
    """

    def __init__(self, dataset: str | Path) -> None:
        self._dataset = dataset
        self._rows = _open_dataset(dataset)
        self.captions: Sequence[str] = list(self._rows["text"])
        for index, caption in enumerate(self.captions):
            if not isinstance(caption, str):
                raise UserError(f"{self.name(index)}: its 'text' is {caption!r:.60}; one caption was expected.")

    def name(self, index: int) -> str:
        """What an error calls the image."""
        return f"Image {index} of the dataset '{self._dataset}'"

    def read(self, index: int) -> bytes:
        """The image as it is stored."""
        stored = self._rows[index]["image"]
        if stored is None:
            raise UserError(f"{self.name(index)} is missing. Leave its row out.")
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()

    def digests(self, cache: Path) -> list[str]:
        """Hex sha256 of every image's bytes; a dataset does not say when its images change, so all are read."""
        return [hashlib.sha256(self.read(index)).hexdigest() for index in range(len(self.captions))]


class SomeImages:
    """Some of the images of a set, in an order of their own.

    Args:
        rows: which.
        digests: of the whole set, as that has told them.
    """

    def __init__(self, images: CaptionedImages, rows: Sequence[int], digests: Sequence[str]) -> None:
        self._images, self._rows = images, rows
        self._digests = [digests[row] for row in rows]
        self.captions: Sequence[str] = [images.captions[row] for row in rows]

    def name(self, index: int) -> str:
        """What an error calls the image."""
        return self._images.name(self._rows[index])

    def read(self, index: int) -> bytes:
        """The image as it is stored."""
        return self._images.read(self._rows[index])

    def digests(self, _cache: Path) -> list[str]:
        """Hex sha256 of every image's bytes."""
        return self._digests


def sort_by_shape(images: CaptionedImages, buckets: Sequence[Size]) -> dict[Size, list[int]]:
    """Which images go to which bucket, by the shapes that their headers tell; buckets of none are left out.

    Raises: UserError: an image is damaged or no image.
    """

    def bucket_of(index: int) -> Size:
        size = picture_size(io.BytesIO(images.read(index)), images.name(index))
        return nearest_bucket(size, buckets)

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(bucket_of, range(len(images.captions))))
    return {bucket: [row for row, one in enumerate(found) if one == bucket] for bucket in sorted(set(found))}


def load_image(images: CaptionedImages, index: int, size: Size) -> Image.Image:
    """Bring an image to a size of training.

    It is read by :func:`dmm.files.picture_reader.open_picture`, shrunk or enlarged until it covers the size, with
    antialiasing, and cut to its middle.

    Args:
        size: width and height in pixels.
    Returns: RGB, 8 bits a channel.
    Raises: UserError: it is damaged or no image.
    """
    image = open_picture(io.BytesIO(images.read(index)), images.name(index))
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _read_memory(memory: Path) -> dict[str, list[Any]]:
    try:
        known: dict[str, list[Any]] = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing is lost but time
        return {}
    return known


def _open_dataset(dataset: str | Path) -> Any:
    try:
        import datasets  # optional
    except ImportError as error:
        raise UserError(
            f"The dataset '{dataset}' needs the package 'datasets': install it with pip install 'dmm[datasets]'."
        ) from error
    path = Path(dataset).expanduser()
    was_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        rows = datasets.load_from_disk(str(path)) if was_saved else datasets.load_dataset(str(dataset), split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"The dataset '{dataset}' could not be opened: {str(error).splitlines()[0]}") from error
    if isinstance(rows, dict):  # a saved dataset has all its splits
        if "train" not in rows:
            raise UserError(f"The dataset '{dataset}' has no split 'train'; it has {', '.join(rows)}.")
        rows = rows["train"]
    for column in ("image", "text"):
        if column not in rows.column_names:
            raise UserError(
                f"The dataset '{dataset}' has no column '{column}'; it has {', '.join(rows.column_names)}. "
                "Rename its columns to 'image' and 'text'."
            )
    return rows.cast_column("image", datasets.Image(decode=False))
