"""Pictures as people have them, read in one way for all commands: upright, in sRGB, 8 bits a channel, on white."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from dmm.errors import UserError, note_once

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError)
"""What Pillow raises of files that it cannot read."""
_FIRST_ON_ITS_SIDE = 5
"""EXIF's orientations from there on have width and height exchanged."""
_COLOURS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Modes of Pillow, by what an ICC profile calls its colour space."""


def open_picture(file: Path | IO[bytes], name: str | None = None) -> Image.Image:
    """A picture file as RGB, 8 bits a channel, as a viewer shows it.

    It is turned the way up that its EXIF says; a colour profile is converted to sRGB; 16 bits of grey are scaled by
    their range, 0 to 65,535; see-through parts are laid on white, which is told once.

    Args:
        file: or what it holds.
        name: that errors call it by; by default the file's.
    Raises: UserError: missing, damaged or no picture; over Pillow's limit of pixels; of pixels without a known range.
    """
    name = name or f"'{file}'"
    with _opened(file, name) as opened:
        image = ImageOps.exif_transpose(opened)
        image.load()
        return _on_white(_to_srgb(_to_8_bits(image, name), name), name)


def picture_size(file: Path | IO[bytes], name: str | None = None) -> tuple[int, int]:
    """Width and height of a picture file as a viewer shows it, by its header alone; arguments and errors as above."""
    with _opened(file, name or f"'{file}'") as opened:
        is_turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= _FIRST_ON_ITS_SIDE
        width, height = opened.size
        return (height, width) if is_turned else (width, height)


@contextmanager
def _opened(file: Path | IO[bytes], name: str) -> Iterator[Image.Image]:
    """A picture file, open; within the block, that it cannot be read is a :class:`UserError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is read: the limit is twice as high
            opened = Image.open(file)
        with opened:
            yield opened
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(
            f"{name} has more pixels than the {most:,} that Pillow opens, lest a small file fill the memory. Shrink it."
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{name} could not be read as a picture: there is no such file. Check the path.") from error
    except _UNREADABLE as error:
        raise UserError(
            f"{name} could not be read as a picture: it is damaged, or of a format that Pillow does not know. Replace "
            "it or leave it out."
        ) from error


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits, scaled; other pictures as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    # Pillow reads 16 bits into 32 of some files
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"{name} has pixels of mode {image.mode}, whose range is not known: 8 or 16 bits a channel were expected. "
            "Convert it."
        )
    scaled = Image.fromarray((values / 257).round().astype(np.uint8))
    scaled.info["icc_profile"] = image.info.get("icc_profile")
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one grey is see-through
        scaled.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return scaled


def _to_srgb(image: Image.Image, name: str) -> Image.Image:
    """The colours that a picture's profile means, as RGB or, with see-through parts, RGBA."""
    profile, alpha = image.info.get("icc_profile"), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colours = _convert(image, profile, name) if profile else image.convert("RGB")
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def _convert(image: Image.Image, profile: bytes, name: str) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _COLOURS[source.profile.xcolor_space]
        if (mode == "CMYK") != (image.mode == "CMYK"):
            raise ValueError(f"a profile of {mode} for pixels of {image.mode}")
        converted = ImageCms.profileToProfile(
            image.convert(mode), source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError):
        note_once("its colour profile cannot be read or does not fit; such pictures are read as sRGB", name)
        return image.convert("RGB")
    assert converted is not None  # only a conversion in place returns nothing
    return converted


def _on_white(image: Image.Image, name: str) -> Image.Image:
    if image.mode != "RGBA":
        return image
    if np.asarray(image)[..., 3].min() < 255:
        note_once("it has see-through parts; such pictures are laid on white", name)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
