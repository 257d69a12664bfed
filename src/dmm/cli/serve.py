"""Open a page in which to paint with a merged model: styles on sliders, mixes, strips, all styles side by side.

With --run it is a page that watches a merge: its curves by style, samples, and how long it takes yet.

The page is for this computer alone unless --host says otherwise, which takes --auth. One painting at a time; others
wait. Nothing is written, but what is sent waits in a temporary folder while the server runs; --exports allows mixes
to be written into a folder. It needs Gradio: pip install 'dmm[app]'.

Examples:
  dmm serve merged
  dmm serve merged --port 8000 --exports exports/
  dmm serve --run merged
  dmm serve merged --host 0.0.0.0 --auth anna:secret --lora detail.safetensors:0.4
"""

import argparse
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmm.cli.opening import add_opening_options, check_opening, open_model, place_model, read_source
from dmm.errors import UserError
from dmm.files.runs import find_run
from dmm.models.style_names import read_style_names

PORT = 7860


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model", metavar="MERGED", nargs="?", help="a merged model: a folder, a hub id, or a file of the authors"
    )
    parser.add_argument("--run", metavar="FOLDER", type=Path, help="watch the merge in this folder instead")
    serving = parser.add_argument_group("to whom")
    serving.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this computer alone)")
    serving.add_argument("--port", type=int, default=PORT, help=f"(default: {PORT})")
    serving.add_argument("--auth", metavar="NAME:PASSWORD", type=_auth, help="asked of everybody")
    serving.add_argument(
        "--exports", metavar="FOLDER", type=Path, help="allow mixes to be written, as checkpoints, here"
    )
    add_opening_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check everything, open the model, and serve until interrupted.

    Raises: UserError: see the options.
    """
    _check(args)
    if args.run is not None:
        _watch(args)
    else:
        _paint(args)


def _watch(args: argparse.Namespace) -> None:
    from dmm.app.server import serve

    def build() -> tuple[Any, Callable[[], None]]:
        from dmm.app.watch_page import watch_page

        return watch_page(args.run), lambda: None

    serve(build, host=args.host, port=args.port, auth=args.auth, told=_tell)


def _paint(args: argparse.Namespace) -> None:
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    from dataclasses import replace

    from dmm.app.server import serve
    from dmm.families import family_of
    from dmm.files.parameters import UsedLora, lora_hash, model_hash
    from dmm.formats.lora import lora_file
    from dmm.models.teachers import locate
    from dmm.pipeline.styled import read_styles

    source = read_source(args)
    path = locate(source)
    prompts = read_styles(path, allow_pickle=args.allow_pickle)
    if prompts is None:
        raise UserError(f"{args.model} is a stock model without styles: name a merged one.")
    pipe = open_model(args, replace(source, model=path), prompts)
    place_model(args, pipe)

    def build() -> tuple[Any, Callable[[], None]]:
        from dmm.app.controls import Controls
        from dmm.app.page import PaintingPage
        from dmm.app.painter import Painter

        model = Path(args.model).expanduser()
        painter = Painter(
            pipe,
            model=model.resolve().stem if model.is_file() else model.resolve().name,
            model_hash=model_hash(model, family_of(pipe).denoiser.name),
            loras=[UsedLora(file.stem, scale, lora_hash(lora_file(file))) for file, scale in args.loras],
            exports=args.exports,
        )
        width, height = painter.size
        weights = {name: float(i == 0) for i, name in enumerate(painter.names)}
        return PaintingPage(painter, Controls(width=width, height=height, weights=weights)).blocks, painter.close

    serve(build, host=args.host, port=args.port, auth=args.auth, told=_tell)


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port is from 1 to 65535, not {args.port}.")
    if not _is_loopback(args.host) and args.auth is None:
        raise UserError(f"--host {args.host} lets others in: add --auth NAME:PASSWORD.")
    if (args.run is None) == (args.model is None):
        raise UserError("Name a merged model to paint with, or a merge to watch with --run; one of them.")
    if args.run is not None:
        if find_run(args.run) is None:
            raise UserError(f"--run {args.run} is not the folder of a merge.")
        return
    if args.exports is not None and not args.exports.is_dir():
        raise UserError(f"--exports {args.exports}: no such folder. Make it first.")
    if args.from_checkpoint:
        raise UserError("--from-checkpoint: the page paints with finished merges; dmm generate has that option.")
    check_opening(args)
    if read_style_names(args.model) == []:
        raise UserError(f"{args.model} is a stock model without styles: name a merged one.")


def _tell(address: str) -> None:
    print(f"Open {address}", flush=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _auth(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise argparse.ArgumentTypeError("write NAME:PASSWORD")
    return name, password
