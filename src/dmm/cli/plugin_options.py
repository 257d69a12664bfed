"""The options that name what guides the painting beside the prompt, and what they ask for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmm.cli.arguments import read_scaled_path
from dmm.cli.style_options import Mix, read_mix, write_style
from dmm.errors import UserError
from dmm.maths.mixes import mix_weights
from dmm.models.style_names import find_side_car, read_style_config

if TYPE_CHECKING:
    from dmm.pipeline.plugins import Control, IPAdapter, Start

STRENGTH = 0.75


def add_plugin_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = parser.add_argument_group("what to follow beside the prompt")
    group.add_argument(
        "--controlnet",
        metavar="FOLDER[:SCALE]",
        type=read_scaled_path,
        action="append",
        default=[],
        help="a ControlNet; may be given several times (scale: 1)",
    )
    group.add_argument(
        "--control-image",
        metavar="FILE",
        type=_path,
        action="append",
        default=[],
        help="what it follows: one for each ControlNet, in their order",
    )
    group.add_argument(
        "--control",
        metavar="NAME[=W],...",
        type=read_mix,
        action="append",
        default=[],
        help="of a merged ControlNet, what to follow: one for each such --controlnet, in their order; of a single one, "
        "repeated with a --control-image each, a row of pictures by each control",
    )
    group.add_argument("--image", metavar="FILE", type=_path, help="begin with an image in place of noise")
    group.add_argument(
        "--strength",
        metavar="S",
        type=float,
        help=f"how much of --image to paint over, from 0 to 1 (default: {STRENGTH})",
    )
    group.add_argument("--mask", metavar="FILE", type=_path, help="paint --image anew only where this is white")
    group.add_argument(
        "--ip-adapter", metavar="FILE[:SCALE]", type=read_scaled_path, help="an IP-Adapter's .safetensors (scale: 1)"
    )
    group.add_argument("--ip-image", metavar="FILE", type=_path, help="the picture that it takes as a prompt")
    group.add_argument(
        "--image-encoder", metavar="FOLDER", type=_path, help="of the IP-Adapter (default: image_encoder beside it)"
    )


def check_plugins(args: argparse.Namespace) -> None:
    """Check what can be checked before anything heavy is imported.

    Raises: UserError: options that go together are not together, a value is out of range, or a file is not there.
    """
    if not by_control(args) and len(args.controlnet) != len(args.control_image):
        raise UserError(
            f"Every --controlnet needs a --control-image: {len(args.controlnet)} and {len(args.control_image)} were "
            "given."
        )
    for option, needs in (
        ("--mask", "--image"),
        ("--strength", "--image"),
        ("--ip-adapter", "--ip-image"),
        ("--ip-image", "--ip-adapter"),
        ("--image-encoder", "--ip-adapter"),
    ):
        if _value(args, option) is not None and _value(args, needs) is None:
            raise UserError(f"{option} goes with {needs}: give both, or neither.")
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"--strength must be above 0 and at most 1, not {args.strength:g}.")
    if args.image is not None and int(args.steps * _strength(args)) < 1:
        raise UserError(
            f"--strength {_strength(args):g} of {args.steps} steps leaves none to paint with: raise one of them."
        )
    for option in ("--image", "--mask", "--ip-image"):
        _check_file(option, _value(args, option))
    for file in args.control_image:
        _check_file("--control-image", file)
    for folder, _ in args.controlnet:
        if not folder.is_dir():
            raise UserError(f"--controlnet {folder}: no such folder. Name the diffusers folder of a ControlNet.")
    _controls(args)
    if args.ip_adapter is not None:
        _check_file("--ip-adapter", args.ip_adapter[0])


def by_control(args: argparse.Namespace) -> bool:
    """Whether one merged ControlNet follows several images by turns, each for a control of its own."""
    return len(args.controlnet) == 1 and len(args.control_image) == len(args.control) > 1


def _controls(args: argparse.Namespace) -> list[Mix | None]:
    """What each ControlNet follows; None of a stock one. Of one that follows several images, what it does by turns.

    Raises: UserError: a merged one is not told what to follow, has no such control; or a control is for none of them.
    """
    given = list(args.control)
    found: list[Mix | None] = []
    for folder, _ in args.controlnet:
        side_car = find_side_car(folder)
        if side_car is None:
            found.append(None)
            continue
        names = read_style_config(side_car / "config.json")[0]
        if not given:
            raise UserError(f"{folder} has several controls: choose with --control from {', '.join(names)}.")
        mine, given = (given, []) if by_control(args) else (given[:1], given[1:])
        for control in mine:
            mix_weights(names, control)
        found += mine
    if given:
        raise UserError(f"--control {write_style(given[0])}: there is no merged --controlnet whose it could be.")
    return found


def read_plugins(args: argparse.Namespace) -> "tuple[list[Control], Start | None, IPAdapter | None]":
    """What the options ask for; see :func:`by_control`."""
    from dmm.pipeline.plugins import Control, IPAdapter, Start

    nets = args.controlnet * len(args.control) if by_control(args) else args.controlnet
    controls = [
        Control(model, image, scale, control)
        for (model, scale), image, control in zip(nets, args.control_image, _controls(args), strict=True)
    ]
    start = None if args.image is None else Start(args.image, _strength(args), args.mask)
    adapter = None
    if args.ip_adapter is not None:
        file, scale = args.ip_adapter
        adapter = IPAdapter(file, args.ip_image, scale, args.image_encoder)
    return controls, start, adapter


def describe_plugins(args: argparse.Namespace) -> dict[str, str]:
    """What a picture says of the plugins it was painted with, by the names that image tools read."""
    told = {}
    for i, (folder, scale) in enumerate(args.controlnet):
        told[f"ControlNet {i}"] = f"Model: {folder.resolve().name}, Weight: {scale:g}"
    if args.control:
        told["Control"] = "; ".join(map(write_style, args.control))
    if args.image is not None:
        told["Denoising strength"] = f"{_strength(args):g}"
        told["Init image"] = args.image.name
    if args.mask is not None:
        told["Mask"] = args.mask.name
    if args.ip_adapter is not None:
        file, scale = args.ip_adapter
        told["IP Adapter"] = f"Model: {file.stem}, Weight: {scale:g}"
    return told


def _strength(args: argparse.Namespace) -> float:
    return STRENGTH if args.strength is None else float(args.strength)


def _value(args: argparse.Namespace, option: str) -> Any:
    return getattr(args, option.removeprefix("--").replace("-", "_"))


def _check_file(option: str, file: Path | None) -> None:
    if file is not None and not file.is_file():
        raise UserError(f"{option} {file}: no such file. Check the path.")


def _path(text: str) -> Path:
    return Path(text).expanduser()
