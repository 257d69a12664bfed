"""See eight models become one, on any computer.

The package carries a base model and eight small real Stable Diffusion experts, fine-tuned from it on drawings of
eight hands. They paint some pictures for each other, and from these one model learns to paint in all eight hands:
what dmm merge does with yours. No GPU, no download and no account are needed; two cores take about three minutes.

Each style becomes an adapter on the base. With --paper it is one vector, and all weights are trained, as in the paper
that the merge comes from (DMM); that takes five to eight minutes, and is further from the experts.

There are experts of other families, too, fewer of each: --family says which.

DIR gets recipe.yaml, by which the experts are merged; merged/, the model; and demo.png: for every prompt a row
by the experts, and under it one by the merged model, from the same noise. Interrupted, it goes on where it was.

Examples:
  dmm demo
  dmm demo --output /tmp/look
  dmm demo --paper
  dmm generate dmm-demo/merged fox --style noto=0.5,fluent=0.5 --guidance 2 --output fox.png
"""

import argparse
import shlex
import time
from pathlib import Path

from dmm.demo.assembly import COLLECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="where to (default: dmm-demo/, dmm-demo-paper/ and so on)"
    )
    parser.add_argument(
        "--family",
        choices=COLLECTIONS,
        default=COLLECTIONS[0],
        help=f"whose experts: {', '.join(COLLECTIONS)} (default: {COLLECTIONS[0]})",
    )
    parser.add_argument("--paper", action="store_true", help="merge as the paper does, one vector a style")


def run(args: argparse.Namespace) -> None:
    """Merge and show; a finished demo is reported and left alone, an unfinished one goes on."""
    from dmm.files.bars import PartsBar
    from dmm.files.outputs import check_folder
    from dmm.models.libraries import quiet_libraries

    named = [args.family] if args.family != COLLECTIONS[0] else []
    folder = args.output or Path("-".join(["dmm-demo", *named, *(["paper"] if args.paper else [])]))
    if (folder / "demo.png").exists():
        print(f"{folder / 'demo.png'} is there already: open it, or name another folder with --output.")
        return
    is_begun = (folder / "recipe.yaml").exists() and (folder / "prompts.txt").exists()
    if not is_begun:
        check_folder(folder)
    quiet_libraries()
    from dmm.demo import story

    start = time.monotonic()
    try:
        if not is_begun:
            story.write_recipe(folder, story.PAPER if args.paper else story.ADAPTERS, family=args.family)
        names = story.styles(args.family)
        print(f"Merging {len(names)} experts: they paint what is learned from, then one model learns.")
        story.merge_experts(folder)
        with PartsBar(story.num_pictures(args.family), " pictures") as bar:
            shown = story.show(folder, bar.update, family=args.family)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("run dmm demo again to go on") from None
    print(
        f"Wrote {shown.picture} in {time.monotonic() - start:.0f} s: for every prompt a row by the {len(names)} "
        "experts, and one by the model that they were merged into.\n"
        f"Of {shown.num_images} pictures each, the judge finds in the right hand: {shown.of_experts.right_styles} of "
        f"the experts', {shown.of_merged.right_styles} of the merged model's; of the right thing: "
        f"{shown.of_experts.right_concepts} and {shown.of_merged.right_concepts}.\n"
        f"  mix: dmm generate {shlex.quote(str(folder / story.MERGED))} fox --style {names[0]}=0.5,{names[-1]}=0.5 "
        "--guidance 2 --output fox.png"
    )
