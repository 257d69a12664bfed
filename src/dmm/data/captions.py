"""Which images a folder holds and what they are captioned, as people have it.

Three conventions, which may be mixed in one tree:

  metadata.jsonl        of ``datasets``' imagefolder: ``{"file_name": "cats/1.png", "text": "a cat"}`` a line, file
                        names relative to it. Images of its folder that no line names are not part of the data.
  1.png with 1.txt      or 1.caption, as kohya's scripts and most taggers have it: the first line is the caption, an
                        empty file an empty one.
  10_concept/           kohya's: each image counts ten times, and is captioned ``concept`` where it has no text file.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmm.errors import UserError, note_once
from dmm.files.json import parse_json
from dmm.files.text import read_text

METADATA = "metadata.jsonl"

_LARGEST = 2**32  # bytes: of the captions of millions of images
CAPTION_SUFFIXES = (".txt", ".caption")
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jxl"))

_REPEATED = re.compile(r"(\d+)_(.*)")
_EXAMPLE = '{"file_name": "1.png", "text": "a caption"}'


def read_captions(folder: Path) -> list[tuple[Path, str]]:
    """The images of a folder and of those in it, and their captions.

    Args:
        folder: in any of this module's conventions.
    Returns: at least one; an image as often as its folder repeats it beside the others, in the least whole numbers
        (``10_a`` and ``20_b``: once and twice), for only that matters where images are drawn at random.
    Raises: UserError: there is none, one has no caption, or what tells captions is not of its form.
    """
    listed: list[tuple[Path, str]] = []
    beside: list[tuple[Path, str, int]] = []
    covered: list[Path] = []  # folders that a metadata.jsonl may tell of
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        here = Path(place)
        if METADATA in names:
            listed += _read_metadata(here / METADATA)
            covered.append(here)
            continue
        must = not any(one in here.parents for one in covered)
        beside += _read_beside(here, sorted(names), must=must)
    named = {path for path, _ in listed}
    beside = [one for one in beside if one[0] not in named]
    if not listed and not beside:
        found = f"the {METADATA} in it is empty" if covered else "there are no images in it"
        raise UserError(
            f"{folder}: {found}. Put images there with captions: 1.txt beside 1.png, or a {METADATA} with a line such "
            f"as {_EXAMPLE} for each."
        )
    common = math.gcd(*(repeats for _, _, repeats in beside), *([1] if listed else []))
    return listed + [(path, caption) for path, caption, repeats in beside for _ in range(repeats // common)]


def read_column(folder: Path, key: str) -> dict[Path, Path]:
    """The files that the lines of every ``metadata.jsonl`` below a folder name under a key, by the line's image.

    Raises: UserError: a line's value is no text, or there is no such file.
    """
    found = {}
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if METADATA not in names:
            continue
        for where, entry in _entries(Path(place) / METADATA):
            if key not in entry:
                continue
            path = Path(place) / str(entry[key])
            if not isinstance(entry[key], str) or not path.is_file():
                raise UserError(f"{where}: its '{key}' is {entry[key]!r:.80}; an image file beside it was expected.")
            found[Path(place) / entry["file_name"]] = path
    return found


def _read_beside(folder: Path, names: list[str], *, must: bool) -> Iterator[tuple[Path, str, int]]:
    """A folder's images that have a caption, how often they count; ``must``: each has to have one."""
    repeated = _REPEATED.fullmatch(folder.name)
    repeats, concept = (int(repeated[1]), repeated[2].strip()) if repeated else (1, None)
    present = set(names)
    for name in names:
        path = folder / name
        if path.suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
            continue
        text = next((path.with_suffix(one) for one in CAPTION_SUFFIXES if path.with_suffix(one).name in present), None)
        caption = concept if text is None else _read_text(text)
        if caption is not None and repeats:  # kohya's way to leave a folder out is to count it 0 times
            yield path, caption, repeats
        elif caption is None and must:
            raise UserError(
                f"'{path}' has no caption: there is no {path.stem}.txt beside it, and no {METADATA} with a line such "
                f"as {_EXAMPLE}. Write one (an empty .txt is an empty caption), or take the image out."
            )


def _read_text(path: Path) -> str:
    lines = [line.strip() for line in _read_lines(path)]
    if any(lines[1:]):
        note_once("it has several lines; of such captions the first line is read, as kohya's scripts do", str(path))
    return lines[0]


def _read_lines(path: Path) -> list[str]:
    # not splitlines: a caption may hold what else ends a line in Unicode
    return read_text(path, str(path), largest=_LARGEST).split("\n")


def _read_metadata(file: Path) -> Iterator[tuple[Path, str]]:
    for where, entry in _entries(file):
        path = file.parent / entry["file_name"]
        if not path.is_file():
            raise UserError(f"{where}: there is no file '{path}'. Put the image there, or take the line out.")
        yield path, entry["text"]


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines, and what errors call each."""
    for number, line in enumerate(_read_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        entry = parse_json(line, where)
        for field in ("file_name", "text"):
            if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
                raise UserError(f"{where} has no string '{field}'; a line such as {_EXAMPLE} was expected.")
        yield where, entry
