"""Let the judge look at what few-step models paint in 1, 2, 4 and 8 steps; print the table of ``docs/results.md``.

``python measure_few_steps.py merged --fast LCM=lcm --fast SPLAM=splam``: MERGED is of the embedded experts, and each
``--fast`` what ``dmm accelerate`` made of it, a folder or a LoRA. Beside them MERGED itself, guided by DPM++ and
without guidance by LCM's sampler, and its experts. What was measured before is found again in ``--output``.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
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

GUIDANCE = 2.0
STEPS = (1, 2, 4, 8)
REFERENCE = "merged, 15 steps, guided"
EXPERTS = "experts, 15 steps, guided"
SHOWN = 12  # prompts of the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path)
    parser.add_argument("--fast", metavar="NAME=PATH", action="append", default=[])
    parser.add_argument("--count", type=int, default=2, help="pictures of each of the 64 concepts, in each style")
    parser.add_argument("--output", type=Path, default=Path("few-steps"), help="folder of figures and pictures")
    args = parser.parse_args()

    judge = load_judge()
    concepts = list(judge.config.concepts)
    prompts = [concept for concept in concepts for _ in range(args.count)]
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / f"figures-{len(prompts)}.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    features = args.output / f"experts-{len(prompts)}.pt"
    of_experts: dict[str, torch.Tensor] = torch.load(features) if features.exists() else {}
    styles = dmm.style_names(load_pipeline(args.merged))
    for name, open_it, settings in cells(args):
        if name in figures:
            continue
        pipeline, right_style, right_concept, distances, shown = open_it(), [], [], [], []
        with tqdm(total=len(prompts) * len(styles), desc=name, unit=" pictures") as bar:
            for style in styles:
                if name == EXPERTS:
                    pipeline = open_pipeline(expert_sources()[style])
                else:
                    dmm.set_style(pipeline, style)
                seeds = list(range(len(prompts)))
                pictures = list(sample(pipeline, prompts, seeds, progress=bar.update, **settings))
                verdict = judge_images(judge, pictures)
                right_style.append(share_right(verdict.style_logits, judge.config.styles.index(style)))
                truth = torch.tensor([concepts.index(prompt) for prompt in prompts])
                right_concept.append((verdict.concept_logits.argmax(1) == truth).float().mean().item())
                if name == EXPERTS:
                    of_experts[style] = verdict.features
                distances.append(distance(verdict, of_experts[style]))
                shown.append(pictures[:: 5 * args.count][:SHOWN])
        figures[name] = [100 * mean(right_style), 100 * mean(right_concept), mean(distances), right_style]
        if name == EXPERTS:
            torch.save(of_experts, features)
        kept.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        rows: list[Image.Image] = [picture for row in shown for picture in row]
        save_png(grid(rows, SHOWN, row_labels=styles), args.output / f"{name}.png".replace(" ", "-"), overwrite=True)
    print(f"\n{len(prompts)} pictures in each of {len(styles)} styles, guidance {GUIDANCE:g}, seeds from 0\n")
    print("| | right hand | right thing | FIDt |\n|---|---|---|---|")
    for name, (hand, thing, distance_, _) in figures.items():
        print(f"| {name} | {hand:.1f} % | {thing:.1f} % | {distance_:.1f} |")


def cells(args: argparse.Namespace) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """What is measured: its name, what opens it, and how it paints."""
    guided = {"guidance_scale": GUIDANCE, "steps": 15}
    fast = {"guidance_scale": 1.0, "sampler": "LCM"}

    def merged() -> Any:
        return load_pipeline(args.merged)

    yield EXPERTS, lambda: None, guided
    yield REFERENCE, merged, guided
    for steps in (2, 4, 1, 8):
        for named in args.fast:
            name, _, path = named.partition("=")
            yield f"{name}, {steps} steps", partial(open_fast, args.merged, Path(path)), {**fast, "steps": steps}
        yield f"merged, {steps} steps, no guidance", merged, {**fast, "steps": steps}
        yield f"merged, {steps} steps, guided", merged, {**guided, "steps": steps}


def open_fast(merged: Path, path: Path) -> Any:
    if path.is_dir():
        return load_pipeline(path)
    pipeline = load_pipeline(merged)
    pipeline.load_lora_weights(path)
    return pipeline


def share_right(logits: torch.Tensor, index: int) -> float:
    return (logits.argmax(1) == index).float().mean().item()


def distance(verdict: Verdict, of_expert: torch.Tensor) -> float:
    return 0.0 if verdict.features is of_expert else fid(verdict.features, of_expert)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
