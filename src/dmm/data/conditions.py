"""Condition images that are made of a picture: what a ControlNet is shown, where the data has no images of it.

Each function takes an RGB picture and returns an RGB picture of the same size. A recipe names one of :data:`MAKERS`,
or a function of the same form in any installed module, as ``package.module:function``.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dmm.errors import UserError

Maker = Callable[[Image.Image], Image.Image]

_EDGE = 48
_GROUND = 24
_FIELDS = 8
_CANNY = (100, 200)


def edges(picture: Image.Image) -> Image.Image:
    """White lines on black where neighbouring pixels' grey differs by more than about 48 of 255."""
    # on a margin of its own colour: the filter leaves the outermost pixels as they are
    grey = np.pad(np.asarray(picture.convert("L")), 1, mode="edge")
    found = Image.fromarray(grey).filter(ImageFilter.FIND_EDGES).crop((1, 1, grey.shape[1] - 1, grey.shape[0] - 1))
    return found.point([255 * (level > _EDGE) for level in range(256)]).convert("RGB")


def colours(picture: Image.Image) -> Image.Image:
    """The picture blurred until only its fields of colour are left, each about an eighth of its shorter side."""
    radius = min(picture.size) / _FIELDS
    # the blur shall see white beyond the border as little as black: the border's own colours go on
    margin = int(3 * radius) + 1
    padded = np.pad(np.asarray(picture.convert("RGB")), ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    blurred = Image.fromarray(padded).filter(ImageFilter.GaussianBlur(radius))
    width, height = picture.size
    return blurred.crop((margin, margin, margin + width, margin + height))


def silhouette(picture: Image.Image) -> Image.Image:
    """White where the thing is, black where its white ground is: what white reaches from the picture's border."""
    pixels = np.asarray(picture.convert("RGB")).min(axis=2)
    # a margin of ground, so that one filling from a corner reaches every side
    is_ground = np.pad(pixels >= 255 - _GROUND, 1, constant_values=True)
    # a copy: what only looks at an array's memory cannot be filled
    ground = Image.fromarray(np.where(is_ground, 255, 0).astype(np.uint8)).copy()
    ImageDraw.floodfill(ground, (0, 0), 128)
    inside = np.asarray(ground)[1:-1, 1:-1] != 128
    return Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).convert("RGB")


def canny(picture: Image.Image) -> Image.Image:
    """Canny's edges with the thresholds 100 and 200, as the first ControlNets were trained on; needs OpenCV.

    Raises: UserError: OpenCV is not installed.
    """
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise UserError(
            "canny edges are found by OpenCV, which is not installed: `pip install opencv-python-headless`, or choose "
            "edges, which needs nothing."
        ) from error
    return Image.fromarray(cv2.Canny(np.asarray(picture.convert("RGB")), *_CANNY)).convert("RGB")


MAKERS: dict[str, Maker] = {"edges": edges, "colours": colours, "silhouette": silhouette, "canny": canny}
"""By the names that recipes call them."""


def maker_named(name: str) -> Maker:
    """The function that a recipe names.

    Args:
        name: a key of :data:`MAKERS`, or ``package.module:function``.
    Raises: UserError: there is none of that name.
    """
    if name in MAKERS:
        return MAKERS[name]
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"'{name}' names no function: {error}. Install what has it, or choose from {', '.join(MAKERS)}."
        ) from error
    if not callable(found):
        raise UserError(
            f"'{name}' makes no condition images; choose from {', '.join(MAKERS)}, or name a function of a picture as "
            "package.module:function."
        )
    maker: Maker = found
    return maker
