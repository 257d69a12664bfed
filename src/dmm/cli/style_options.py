"""The options that choose styles, and the styles that they ask for."""

import argparse
import re
from collections.abc import Mapping

from dmm.errors import UserError
from dmm.pipeline.style_schedule import StyleSchedule, check_style

Mix = dict[str, float]
"""Names with weights that sum to 1; a style by itself is a mix of one."""
Style = Mix | StyleSchedule
"""A mix, or one for each part of the denoising steps."""

STRIP_STEPS = 11


def add_style_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--style``, ``--styles``, ``--strip`` and ``--pairs``, of which one may be given."""
    group = parser.add_argument_group("styles of a merged model (one of these options)")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument(
        "--style",
        metavar="NAME[=W],...",
        type=read_style,
        action="append",
        help="a style, a mix as in a=0.7,b=0.3, or one over time as in 0-0.4:a;0.4-1:b; repeated, a picture in each",
    )
    one_of.add_argument("--styles", metavar="NAMES", type=_names, help="a picture in each: all, or names as in a,b,c")
    one_of.add_argument(
        "--strip", metavar="A,B", type=_two_names, help=f"from style A to style B in --count steps ({STRIP_STEPS})"
    )
    one_of.add_argument("--pairs", action="store_true", help="every two styles half and half, as a square grid")


def asks_for_styles(args: argparse.Namespace) -> bool:
    """Whether any of the options is given."""
    return bool(args.style or args.styles or args.strip or args.pairs)


def choose_styles(args: argparse.Namespace, names: list[str]) -> list[Style]:
    """The styles that the options ask for, one or more.

    Of ``--pairs``, each pair once: every style with itself and those after it, which is the upper half of the grid.

    Args:
        names: of the model's styles, in its order.
    Raises: UserError: the model has no such style, weights do not sum to 1, or a style is asked for twice.
    """
    styles: list[Style]
    if args.strip:
        first, last = args.strip
        styles = _strip(first, last, args.count or STRIP_STEPS)
    elif args.pairs:
        styles = [{one: 0.5, other: 0.5} if one != other else {one: 1.0} for one, other in pairs(names)]
    elif args.styles:
        styles = [{name: 1.0} for name in (names if args.styles == ["all"] else args.styles)]
    else:
        styles = args.style
    for i, style in enumerate(styles):
        check_style(names, style)
        if style in styles[:i]:
            raise UserError(f"The style '{write_style(style)}' is asked for twice.")
    return styles


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Every style with itself and with those after it."""
    return [(one, other) for i, one in enumerate(names) for other in names[i:]]


def read_style(text: str) -> Style:
    """A style as people write it: a mix, or one over time as in ``0-0.4:ink;0.4-1:ink=0.5,photo=0.5``.

    Raises: argparse.ArgumentTypeError: it reads otherwise, or its parts do not follow each other from 0 to 1.
    """
    if ":" not in text:
        return read_mix(text)
    parts = []
    for part in text.split(";"):
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*:(.*)", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"'{part}' is no part of a style over time; write 0-0.4:a;0.4-1:b")
        parts.append((float(match[1]), float(match[2]), read_mix(match[3])))
    try:
        return StyleSchedule(parts)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_mix(text: str) -> Mix:
    """A style or a mix as people write it: ``ink`` or ``ink=0.7,photo=0.3``.

    Raises: argparse.ArgumentTypeError: it reads otherwise, or names a style twice.
    """
    style: Mix = {}
    for part in text.split(","):
        name, equals, weight = (word.strip() for word in part.partition("="))
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            value = None
        if not name or value is None:
            raise argparse.ArgumentTypeError(f"'{text}' is no style; write a name, or a mix as in a=0.7,b=0.3")
        if name in style:
            raise argparse.ArgumentTypeError(f"'{text}' names '{name}' twice")
        style[name] = value
    return style


def write_style(style: Style) -> str:
    """The text that :func:`read_style` reads as ``style``, its numbers to six digits."""
    if isinstance(style, StyleSchedule):
        return ";".join(f"{start:g}-{end:g}:{_write_mix(mix)}" for start, end, mix in style.parts)
    return _write_mix(style)


def _write_mix(mix: str | Mapping[str, float] | None) -> str:
    if not isinstance(mix, Mapping):
        return mix or ""
    if list(mix.values()) == [1.0]:
        return next(iter(mix))
    return ",".join(f"{name}={weight:g}" for name, weight in mix.items())


def _strip(first: str, last: str, steps: int) -> list[Style]:
    middle: list[Style] = [{first: 1 - i / (steps - 1), last: i / (steps - 1)} for i in range(1, steps - 1)]
    return [{first: 1.0}, *middle, {last: 1.0}]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of styles; write all, or names as in a,b,c")
    return names


def _two_names(text: str) -> list[str]:
    names = _names(text)
    if len(names) != 2 or names[0] == names[1]:
        raise argparse.ArgumentTypeError(f"'{text}' is not two styles; write A,B")
    return names
