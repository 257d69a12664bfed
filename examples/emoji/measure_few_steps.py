"""Let the judge look at what few-step models paint in 1, 2, 4 and 8 steps; print the table of ``docs/results.md``.

``python measure_few_steps.py merged --fast LCM=lcm --fast SPLAM=splam``: MERGED is of the embedded experts, and each
``--fast`` what ``dmm accelerate`` made of it, a folder or a LoRA. Beside them MERGED itself, guided by DPM++ and
without guidance by LCM's sampler, and its experts. What was measured before is found again in ``--output``.

FIDt is of the experts' pictures from other noise: a sampler that adds its own paints no expert's very picture.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import dmm
from dmm.demo.assembly import expert_sources
from dmm.demo.judge import Verdict, judge_images, load_judge
from dmm.evaluation.distances import fid
from dmm.files.pictures import grid, save_png
from dmm.models.teachers import open_pipeline
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import load_pipeline

GUIDED: dict[str, Any] = {"guidance_scale": 2.0, "steps": 15}
REFERENCE_NOISE = 1_000_000  # added to the seeds of the experts' pictures that all are compared with
SHOWN = 12  # prompts of the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path)
    parser.add_argument("--fast", metavar="NAME=PATH", action="append", default=[])
    parser.add_argument("--count", type=int, default=2, help="pictures of each of the 64 concepts, in each style")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("few-steps"), help="folder of figures and pictures")
    args = parser.parse_args()

    judge = load_judge()
    concepts = list(judge.config.concepts)
    prompts = [concept for concept in concepts for _ in range(args.count)]
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / f"figures-{len(prompts)}.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    styles = dmm.style_names(load_pipeline(args.merged))

    def look(
        name: str, open_it: Callable[[str], Any], first_seed: int, **settings: Any
    ) -> Iterator[tuple[str, Verdict]]:
        """What the judge says of what a model paints in each style; keeps a picture of some of it."""
        shown: list[Image.Image] = []
        seeds = range(first_seed, first_seed + len(prompts))
        with tqdm(total=len(prompts) * len(styles), desc=name, unit=" pictures") as bar:
            for style in styles:
                pipeline = open_it(style).to(args.device)
                pictures = list(sample(pipeline, prompts, seeds, progress=bar.update, **settings))
                shown += pictures[:: 5 * args.count][:SHOWN]
                yield style, judge_images(judge, pictures)
        picture = grid(shown, len(shown) // len(styles), row_labels=styles)
        save_png(picture, args.output / f"{name}.png".replace(" ", "-"), overwrite=True)

    features = args.output / f"experts-{len(prompts)}.pt"
    if not features.exists():
        found = look("experts, other noise", open_expert, REFERENCE_NOISE, **GUIDED)
        torch.save({style: verdict.features for style, verdict in found}, features)
    of_experts: dict[str, torch.Tensor] = torch.load(features)
    truth = torch.tensor([concepts.index(prompt) for prompt in prompts])
    for name, open_it, settings in cells(args):
        if name in figures:
            continue
        hands, things, distances = [], [], []
        for style, verdict in look(name, open_it, args.first_seed, **settings):
            hands.append(share_right(verdict.style_logits, torch.tensor(judge.config.styles.index(style))))
            things.append(share_right(verdict.concept_logits, truth))
            distances.append(fid(verdict.features, of_experts[style]))
        figures[name] = [100 * mean(hands), 100 * mean(things), mean(distances), hands]
        kept.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"\n{len(prompts)} pictures in each of {len(styles)} styles, seeds from {args.first_seed}\n")
    print("| | right hand | right thing | FIDt |\n|---|---|---|---|")
    for name, (hand, thing, distance_, _) in figures.items():
        print(f"| {name} | {hand:.1f} % | {thing:.1f} % | {distance_:.1f} |")


def cells(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[str], Any], dict[str, Any]]]:
    """What is measured: its name, what opens it in a style, and how it paints."""
    fast = {"guidance_scale": 1.0, "sampler": "LCM"}
    merged = in_style(lambda: load_pipeline(args.merged))
    yield "experts, 15 steps, guided", open_expert, GUIDED
    yield "merged, 15 steps, guided", merged, GUIDED
    for steps in (2, 4, 1, 8):
        for named in args.fast:
            name, _, path = named.partition("=")
            yield (
                f"{name}, {steps} steps",
                in_style(partial(open_fast, args.merged, Path(path))),
                {**fast, "steps": steps},
            )
        yield f"merged, {steps} steps, no guidance", merged, {**fast, "steps": steps}
        yield f"merged, {steps} steps, guided", merged, {**GUIDED, "steps": steps}


def open_expert(style: str) -> Any:
    return open_pipeline(expert_sources()[style])


def in_style(open_it: Callable[[], Any]) -> Callable[[str], Any]:
    """What sets a style on a pipeline that is opened once."""
    opened = cache(open_it)

    def of_style(style: str) -> Any:
        dmm.set_style(opened(), style)
        return opened()

    return of_style


def open_fast(merged: Path, path: Path) -> Any:
    if path.is_dir():
        return load_pipeline(path)
    pipeline = load_pipeline(merged)
    pipeline.load_lora_weights(path)
    return pipeline


def share_right(logits: torch.Tensor, truth: torch.Tensor) -> float:
    return (logits.argmax(1) == truth).float().mean().item()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
