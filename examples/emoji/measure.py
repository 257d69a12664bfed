"""Let the judge look at what the base and the experts paint; print the tables of ``docs/results.md``.

``python measure.py --count 4`` samples every published concept from four fixed seeds with each model.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from dmm.demo.assembly import expert_sources
from dmm.demo.judge import judge_images, load_judge
from dmm.models.teachers import open_pipeline
from dmm.pipeline.sampling import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4, help="pictures of each of the 64 concepts")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models only")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()

    judge = load_judge()
    styles, concepts = list(judge.config.styles), list(judge.config.concepts)
    prompts = [concept for concept in concepts for _ in range(args.count)]
    truth = torch.tensor([i for i in range(len(concepts)) for _ in range(args.count)])
    seeds = list(range(len(prompts)))
    figures = {}
    for name, source in expert_sources().items():
        if args.only and name not in args.only:
            continue
        with tqdm(total=len(prompts), desc=name, unit=" pictures") as bar:
            pictures = sample(
                open_pipeline(source), prompts, seeds, steps=args.steps, guidance_scale=args.guidance,
                progress=bar.update,
            )  # fmt: skip
            verdict = judge_images(judge, list(pictures))
        taken_for = torch.bincount(verdict.style_logits.argmax(1), minlength=len(styles)) / len(prompts)
        right = (verdict.concept_logits.argmax(1) == truth).float().mean().item()
        figures[name] = {**dict(zip(styles, taken_for.tolist(), strict=True)), "right concept": right}

    print(
        f"\n{len(prompts)} pictures each, {args.steps} steps, guidance {args.guidance:g}, seeds 0-{len(prompts) - 1}\n"
    )
    print(f"| painted by | {' | '.join(styles)} | right concept |")
    print("|---|" + "---|" * (len(styles) + 1))
    for name, shares in figures.items():
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares.values())} |")
    own = [shares[name] for name, shares in figures.items() if name in styles]
    if own:
        print(f"\nRight style: {sum(own) / len(own):.1%} on average over the experts, {min(own):.1%} at least.")
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
