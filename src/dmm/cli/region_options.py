"""The options that give regions of a picture styles and prompts of their own."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmm.cli.style_options import Mix, read_mix, write_style
from dmm.errors import UserError
from dmm.pipeline.style_schedule import StyleSchedule

if TYPE_CHECKING:
    from PIL import Image

    from dmm.pipeline.regions import Region

Numbers = tuple[float, float, float, float]


@dataclass(frozen=True)
class AskedRegion:
    """A region as the command line has it."""

    area: Numbers | Path
    """A box, in pixels or, where no number is above 1, in fractions; or a mask's file."""
    style: Mix
    prompt: str | None

    def __str__(self) -> str:
        area = str(self.area) if isinstance(self.area, Path) else ",".join(f"{number:g}" for number in self.area)
        return ":".join([area, write_style(self.style), *([self.prompt] if self.prompt else [])])


def add_region_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--region``, ``--panorama`` and ``--tile``."""
    group = parser.add_argument_group("regions of a merged model's picture")
    group.add_argument(
        "--region",
        metavar="AREA:STYLE[:PROMPT]",
        type=read_region,
        action="append",
        default=[],
        help="a part of the picture in a style, or a mix, of its own: AREA is x0,y0,x1,y1 in pixels or fractions, or a "
        "mask image, white where the region is; repeated, as many regions; elsewhere --style holds",
    )
    group.add_argument(
        "--panorama",
        metavar="W",
        type=int,
        help="a picture W pixels wide, from left to right in the styles of --styles, each melting into the next",
    )
    group.add_argument(
        "--tile",
        metavar="N",
        type=int,
        help="paint in tiles of N pixels a side (default: the model's own size, where the picture is far larger)",
    )


def asks_for_regions(args: argparse.Namespace) -> bool:
    """Whether any of the options is given."""
    return bool(args.region or args.panorama or args.tile)


def check_regions(args: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises: UserError: see the options.
    """
    if not asks_for_regions(args):
        return
    if args.panorama and not args.styles:
        raise UserError("--panorama goes from style to style: name them with --styles, as in --styles ink,photo.")
    if args.panorama and args.width:
        raise UserError("--panorama is the picture's width: leave out --width.")
    if args.panorama and args.region:
        raise UserError("--panorama divides the picture by itself: leave out --region.")
    if args.strip or args.pairs or (args.styles and not args.panorama):
        raise UserError("--region and --tile paint one picture: leave out --styles, --strip and --pairs.")
    if args.style and (len(args.style) > 1 or isinstance(args.style[0], StyleSchedule)):
        raise UserError("With regions, --style is what holds elsewhere: give one style or mix, the same at all times.")
    for region in args.region:
        if isinstance(region.area, Path) and not region.area.is_file():
            raise UserError(f"There is no mask '{region.area}', and it is no box either; write x0,y0,x1,y1.")


def describe_regions(args: argparse.Namespace) -> dict[str, str]:
    """What a picture's ``parameters`` say of them."""
    told = {"Regions": "; ".join(map(str, args.region))} if args.region else {}
    if args.panorama:
        told["Panorama"] = ", ".join(args.styles)
    return told | ({"Tile": str(args.tile)} if args.tile else {})


def read_region(text: str) -> AskedRegion:
    """``0,0,0.5,1:ink``, ``0,0,256,512:ink=0.7,photo=0.3:a red cat`` or ``mask.png:ink``.

    Raises: argparse.ArgumentTypeError: it reads otherwise, or mixes pixels and fractions.
    """
    area, colon, rest = text.partition(":")
    style, _, prompt = rest.partition(":")
    if not colon or not area or not style:
        raise argparse.ArgumentTypeError(f"'{text}' is no region; write x0,y0,x1,y1:STYLE or mask.png:STYLE:PROMPT")
    return AskedRegion(_read_area(area), read_mix(style), prompt or None)


def regions_of(args: argparse.Namespace, names: Sequence[str], width: int, height: int) -> "list[Region]":
    """The regions that the options ask for, of a picture of that size.

    Args:
        names: of the model's styles, for ``--panorama`` with ``--styles all``.
    Raises: UserError: a mask cannot be read.
    """
    from dmm.files.picture_reader import open_picture
    from dmm.pipeline.regions import Region

    if args.panorama:
        chosen = list(names) if args.styles == ["all"] else args.styles
        part = width / len(chosen)
        return [Region((i * part, 0, (i + 1) * part, height), name) for i, name in enumerate(chosen)]
    regions = []
    area: Image.Image | Numbers
    for asked in args.region:
        if isinstance(asked.area, Path):
            area = open_picture(asked.area).convert("L")
        else:
            area = to_pixels(asked.area, width, height)
        regions.append(Region(area, asked.style, asked.prompt))
    return regions


def to_pixels(box: Numbers, width: int, height: int) -> Numbers:
    """A box in pixels, of a picture of that size, whichever it was given in."""
    x, y = (width, height) if max(box) <= 1 else (1, 1)
    x0, y0, x1, y1 = box
    return (x0 * x, y0 * y, x1 * x, y1 * y)


def _read_area(text: str) -> Numbers | Path:
    try:
        x0, y0, x1, y1 = (float(number) for number in text.split(","))
    except ValueError:
        return Path(text).expanduser()
    box = (x0, y0, x1, y1)
    if max(box) > 1 and not all(number.is_integer() for number in box):
        raise argparse.ArgumentTypeError(f"'{text}' is no box; write four whole pixels, or four fractions up to 1")
    return box
