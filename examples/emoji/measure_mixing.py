"""Is mixing smooth? Paint eleven weights between pairs of styles, and print how even the steps between them are.

``python measure_mixing.py MERGED`` takes every style with the next one, from the first to the last and round to the
first. A step is how far two neighbouring pictures of a strip are apart: the root mean square of their pixels'
difference, and the distance of the judge's features. Of even steps, the largest is 1 times the mean; of one jump with
nothing around it, 10 times.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dmm.demo.judge import judge_images, load_judge
from dmm.files.pictures import grid, save_png
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import load_pipeline, style_names

PROMPTS = ("fox", "red apple", "octopus", "rocket")


@dataclass(frozen=True)
class Evenness:
    """Of the steps along one strip.

    Attributes:
        largest, mean: steps, in the space's unit.
        at: where the largest is, as the weight of the second style in its middle.
    """

    largest: float
    mean: float
    at: float

    @property
    def ratio(self) -> float:
        """The largest step over the mean step; from 1 to the number of steps."""
        return self.largest / self.mean


def evenness(points: Tensor, scale: float = 1.0) -> Evenness:
    """How even the steps along a strip are.

    Args:
        points: (K, ...), pictures or their features, K >= 2.
        scale: of a distance.
    """
    steps = scale * points.double().flatten(1).diff(dim=0).norm(dim=1)
    largest = int(steps.argmax())
    return Evenness(steps[largest].item(), steps.mean().item(), (largest + 0.5) / len(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that dmm merge wrote")
    parser.add_argument("--pair", action="append", metavar="A,B", help="these styles; may be given several times")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--count", type=int, default=11, help="weights of a strip, both ends among them")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--picture", type=Path, help="draw the first prompt's strip of every pair, from the first seed")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    if args.count < 3:
        parser.error(f"--count {args.count}: at least 3 are needed for two steps")

    pipeline = load_pipeline(args.model)
    styles = style_names(pipeline)
    around = {frozenset(pair): pair for pair in pairwise([*styles, styles[0]])}  # of two styles there is one pair
    pairs = [tuple(pair.split(",")) for pair in args.pair or ()] or list(around.values())
    weights = [i / (args.count - 1) for i in range(args.count)]
    judge = load_judge()
    rows: list[Image.Image] = []
    figures: dict[str, list[dict[str, float]]] = {}
    strips = [(prompt, seed) for prompt in args.prompts for seed in args.seeds]
    print(f"{len(strips)} strips of {args.count} weights for each pair, {args.steps} steps, guidance {args.guidance:g}")
    print("| pair | pixels: mean step | largest / mean | worst | features: mean step | largest / mean | worst |")
    print("|---|---|---|---|---|---|---|")
    for a, b in pairs:
        cells = [(*strip, {a: 1 - weight, b: weight}) for strip in strips for weight in weights]
        prompts, seeds, mixes = zip(*cells, strict=True)
        with tqdm(total=len(cells), desc=f"{a}, {b}", unit=" pictures", leave=False) as bar:
            settings = {"steps": args.steps, "guidance_scale": args.guidance, "progress": bar.update}
            pictures = list(sample(pipeline, prompts, seeds, styles=mixes, **settings))
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        features = judge_images(judge, pictures).features
        of_pixels = [evenness(strip, pixels[0].numel() ** -0.5) for strip in pixels.split(args.count)]
        of_features = [evenness(strip) for strip in features.split(args.count)]
        cells_of_table = []
        for found in (of_pixels, of_features):
            ratios = [one.ratio for one in found]
            mean_step = sum(one.mean for one in found) / len(found)
            cells_of_table += [f"{mean_step:.3g}", f"{sum(ratios) / len(ratios):.2f}", f"{max(ratios):.2f}"]
        print(f"| {a}, {b} | {' | '.join(cells_of_table)} |", flush=True)
        figures[f"{a},{b}"] = [
            {"pixels": one.ratio, "pixels_at": one.at, "features": other.ratio, "features_at": other.at}
            for one, other in zip(of_pixels, of_features, strict=True)
        ]
        rows += pictures[: args.count]

    for space in ("pixels", "features"):
        ratios = [strip[space] for found in figures.values() for strip in found]
        print(
            f"{space}: largest step over mean step {sum(ratios) / len(ratios):.2f} on average over {len(ratios)} "
            f"strips, {statistics.median(ratios):.2f} in the median, {max(ratios):.2f} at worst"
        )
    if args.picture:
        labels = {"row_labels": [f"{a} to {b}" for a, b in pairs], "column_labels": [f"{w:g}" for w in weights]}
        save_png(grid(rows, args.count, **labels), args.picture, overwrite=True)
        print(f"Wrote {args.picture}.")
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
