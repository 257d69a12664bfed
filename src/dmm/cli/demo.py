"""See what dmm has to merge: the embedded experts paint the same things, each in its own hand.

The package carries a base model and eight small real Stable Diffusion experts, fine-tuned from it on
drawings of eight hands. No GPU, no download and no account are needed. DIR gets one picture,
experts.png: prompts down, the base and the experts across.

Examples:
  dmm demo
  dmm demo --output /tmp/look
"""

import argparse
import time
from pathlib import Path

from tqdm import tqdm

from dmm.cli.arguments import BAR


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("dmm-demo"), help="where to (default: dmm-demo/)"
    )


def run(args: argparse.Namespace) -> None:
    """Paint and show; a finished demo is reported and left alone."""
    from dmm.cli.libraries import quiet_libraries
    from dmm.outputs import check_folder

    if (args.output / "experts.png").exists():
        print(f"{args.output / 'experts.png'} is there already: open it, or name another folder with --output.")
        return
    check_folder(args.output)
    quiet_libraries()
    from dmm.demo.story import num_pictures, show_experts

    start = time.monotonic()
    try:
        with tqdm(total=num_pictures(), unit=" pictures", bar_format=BAR) as bar:
            show = show_experts(args.output, bar.update)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written; run dmm demo again") from None
    print(
        f"Wrote {show.grid} in {time.monotonic() - start:.0f} s: prompts down, the base and eight experts across.\n"
        f"Of the experts' {show.num_images} pictures the judge finds {show.right_styles} in the expert's own hand, "
        f"{show.right_concepts} of the thing asked for."
    )
