"""The drawings: eight captioned image folders, or one of a hand of its own, read once into memory, and their
augmentation.

The eight follow the ``datasets`` imagefolder convention: ``STYLE/metadata.jsonl`` with
``file_name``, ``text`` (Unicode's short name of the concept) and ``group``; pictures are 64 x 64 RGB.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dmm.data.images import ImageFolder
from dmm.files.picture_reader import open_picture

STYLES = (
    "noto",
    "noto-blob",
    "twemoji",
    "openmoji",
    "openmoji-black",
    "fluent",
    "fluent-flat",
    "fluent-contrast",
)
SIZE = 32  # pixels a side of everything that is trained here
CONCEPTS = tuple(Path(__file__).with_name("concepts.txt").read_text(encoding="utf-8").split("\n")[:-1])


@dataclass(frozen=True)
class Drawings:
    """N drawings with their labels.

    Attributes:
        images: (N, 3, 64, 64) uint8.
        styles: (N,) int64, index into :data:`STYLES`.
        concepts: (N,) int64, index into :data:`CONCEPTS`; -1 for a concept that is not published.
        texts: the N captions.
        groups: what kind of thing each is, Unicode's word.
    """

    images: Tensor
    styles: Tensor
    concepts: Tensor
    texts: list[str]
    groups: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, keep: Tensor) -> "Drawings":
        """The drawings where ``keep``, (N,) bool, is true."""
        indices = keep.nonzero().flatten()
        texts, groups = ([words[i] for i in indices.tolist()] for words in (self.texts, self.groups))
        return Drawings(self.images[indices], self.styles[indices], self.concepts[indices], texts, groups)


def read_drawings(folder: Path) -> Drawings:
    """Read all styles' folders below ``folder``."""
    images, styles, concepts, texts, groups = [], [], [], [], []
    number_of = {name: i for i, name in enumerate(CONCEPTS)}
    for style, name in enumerate(STYLES):
        for line in (folder / name / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            with Image.open(folder / name / row["file_name"]) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
            styles.append(style)
            concepts.append(number_of.get(row["text"], -1))
            texts.append(row["text"])
            groups.append(row["group"])
    return Drawings(torch.stack(images), torch.tensor(styles), torch.tensor(concepts), texts, groups)


def holds_hands(folder: Path) -> bool:
    """Whether a folder holds the eight hands' folders, or some of them, rather than one hand's pictures."""
    return any((folder / style / "metadata.jsonl").is_file() for style in STYLES)


def read_hand(folder: Path) -> tuple[Tensor, list[str]]:
    """Read one hand's own pictures, of any size, and their captions.

    Each picture is brought whole to 64 x 64 pixels, in the middle of a white ground.

    Args:
        folder: in any of the conventions of :mod:`dmm.data.captions`.
    Returns: (N, 3, 64, 64) uint8 and the N captions.
    Raises: UserError: no such folder, a picture is damaged, or something is wrong with the captions.
    """
    hand = ImageFolder(folder)
    images = []
    for index in range(len(hand.captions)):
        picture = open_picture(io.BytesIO(hand.read(index)), hand.name(index))
        whole = ImageOps.pad(picture, (2 * SIZE, 2 * SIZE), Image.Resampling.LANCZOS, color="white")
        images.append(torch.from_numpy(np.array(whole)).permute(2, 0, 1))
    return torch.stack(images), list(hand.captions)


def held_out_texts(drawings: Drawings) -> set[str]:
    """Every 20th unpublished concept, in all its styles: what no VAE here is trained on."""
    unpublished = sorted({t for t, c in zip(drawings.texts, drawings.concepts.tolist(), strict=True) if c < 0})
    return set(unpublished[::20])


def shrink(images: Tensor) -> Tensor:
    """(B, 3, 64, 64) uint8 to (B, 3, 32, 32) float in [-1, 1], each pixel the mean of four."""
    return F.avg_pool2d(images.float() / 127.5 - 1, 64 // SIZE)


def augment(images: Tensor, generator: torch.Generator, zoom: float, turn: float, shift: float) -> Tensor:
    """Zoom, turn and shift each picture at random on its white ground, then shrink it.

    Args:
        images: (B, 3, 64, 64) uint8.
        zoom: largest relative change of size.
        turn: largest angle, radians.
        shift: largest shift, as a share of the picture's width.
    Returns: (B, 3, 32, 32) float in [-1, 1].
    """

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    scale, angle = 1 / (1 + uniform(zoom)), uniform(turn)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, uniform(2 * shift), sin, cos, uniform(2 * shift)], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    # ink is 0 on the white ground, so that padding with zeros draws more ground
    ink = F.grid_sample(1 - images.float() / 255, grid, align_corners=False)
    return F.avg_pool2d(1 - 2 * ink, 64 // SIZE)


def nudge(images: Tensor, generator: torch.Generator, reach: int) -> Tensor:
    """Shift each picture by up to ``reach`` whole pixels each way on its white ground, then shrink it.

    Unlike :func:`augment` this resamples nothing: the lines stay as crisp as they were drawn.

    Args:
        images: (B, 3, 64, 64) uint8.
    Returns: (B, 3, 32, 32) float in [-1, 1].
    """
    padded = F.pad(images, (reach,) * 4, value=255)
    corners = torch.randint(2 * reach + 1, (len(images), 2), generator=generator).tolist()
    size = images.shape[-1]
    moved = [picture[:, y : y + size, x : x + size] for picture, (y, x) in zip(padded, corners, strict=True)]
    return shrink(torch.stack(moved))
