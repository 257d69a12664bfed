"""How far the paper's settings come in 24,000 samples on the embedded experts, and how soon other ways are there.

The paper's settings are: start at the base, features weighed 0.001, a constant rate. The rate is the best of three:
that of a model four hundred times as large says nothing here. Beside them run our rank 0 (`dmm demo --paper`) and
adapters (`dmm demo`), untrained and trained; same experts, same pictures, one process and one thread each.

  python benchmarks/paper.py WORK                      all, one after another; goes on where it was stopped
  python benchmarks/paper.py WORK --ways paper-0.001   one way alone, and no table: where there are many cores
  python benchmarks/paper.py WORK --samples 400 --num-images 20     to try it

The score error is that of `dmm evaluate`, on all experts' latents; the curve along a run, ``log.jsonl``'s.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmm.demo import story

RATES = (2.5e-4, 5e-4, 1e-3)
BATCH_SIZE: int = story.PAPER["training"]["batch_size"]
WATCHED = 24
"""Points of a curve."""


@dataclass(frozen=True)
class Way:
    """How the experts are merged.

    Attributes:
        method: of the demo.
        changes: to its recipe, as ``--set`` takes them.
    """

    method: Mapping[str, Any]
    changes: Mapping[str, str] = field(default_factory=dict)


def ways(samples: int) -> dict[str, Way]:
    """All that are compared, by name; those of rank 0 are trained on as many samples."""
    steps = max(1, samples // BATCH_SIZE)
    told = {"training.steps": str(steps), "logging.score_error_every": str(max(1, steps // WATCHED))}
    papers = {"start": "base", "losses.feature": "0.001", "losses.noise_weighting": "0", "training.warmup_steps": "0"}
    papers |= {"training.lr_schedule": "constant", **told}
    return {
        **{f"paper-{rate:g}": Way(story.PAPER, {**papers, "training.learning_rate": str(rate)}) for rate in RATES},
        "rank-0": Way(story.PAPER, {**told, "training.warmup_steps": str(steps // 20)}),
        "adapters-untrained": Way(story.ADAPTERS, {"styles.train": "none"}),
        "adapters": Way(story.ADAPTERS),
    }


def run(name: str, way: Way, work: Path, num_images: int) -> None:
    """Merge and evaluate, as far as that has not been done; keeps the CPU seconds of the merge."""
    folder = work / name
    spent = folder / "seconds.json"
    if not spent.exists():
        recipe = story.write_recipe(folder, way.method)
        changes = [word for key, value in way.changes.items() for word in ("--set", f"{key}={value}")]
        before = _spent()
        # with a cache of its own each paints its pictures itself, and all take what they take
        words = ["merge", str(recipe), "--output", str(folder / "merged"), "--resume", *changes]
        _dmm(*words, XDG_CACHE_HOME=str(folder / "cache"))
        spent.write_text(json.dumps(_spent() - before), encoding="utf-8")
    if not (folder / "report" / "report.json").exists():
        settings = ["--quick", "--num-images", str(num_images), "--extractor", "judge", "--precision", "fp32"]
        settings += ["--guidance", str(story.GUIDANCE_SCALE), "--steps", "15"]
        _dmm("evaluate", str(folder / "merged"), *settings, "--output", str(folder / "report"))


def _dmm(*words: str, **environment: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    subprocess.run([sys.executable, "-m", "dmm", *words], check=True, env=environment, stdout=subprocess.DEVNULL)


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Ended:
    """What a way came to.

    Attributes:
        samples: that it was trained on, by what was logged.
        seconds: of CPU time, for all of the merge.
        error: the score error of `dmm evaluate`.
        curve: score errors along the run, by samples; empty where styles are trained by themselves.
    """

    samples: int
    seconds: float
    error: float
    curve: list[tuple[int, float]]


def ended(folder: Path) -> Ended:
    """Read what :func:`run` left."""
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    of_styles = sorted((folder / "merged" / "training").glob("*/log.jsonl"))
    whole = folder / "merged" / "log.jsonl"
    rows = _rows(whole) if whole.exists() else []
    curve = [(row["step"] * BATCH_SIZE, row["score_error"]) for row in rows if "score_error" in row]
    steps = sum(_rows(one)[-1]["step"] for one in of_styles) or (rows[-1]["step"] if rows else 0)
    return Ended(steps * BATCH_SIZE, seconds, report["score_error"]["mean"], curve)


def _rows(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def reached(curve: list[tuple[int, float]], error: float) -> float | None:
    """After how many samples a curve first comes down to an error, between its points by a line; None: never."""
    before: tuple[int, float] | None = None
    for samples, value in curve:
        if value <= error:
            if before is None or before[1] == value:
                return samples
            return before[0] + (samples - before[0]) * (before[1] - error) / (before[1] - value)
        before = samples, value
    return None


def table(found: Mapping[str, Ended]) -> str:
    """All ways, and when each is where the best of the paper's ends."""
    papers = {name: one for name, one in found.items() if name.startswith("paper")}
    name = min(papers, key=lambda one: papers[one].error)
    paper = papers[name]
    lines = [
        f"The paper's settings at their best, {name}, end at a score error of {paper.error:.3f}.\n",
        "| | samples | CPU seconds of the merge | score error | as good as the paper's after | of its samples |",
        "|---|---|---|---|---|---|",
    ]
    for key, one in found.items():
        after: float | None
        if one.curve:
            after = one.samples if one is paper else reached(one.curve, paper.curve[-1][1])
        else:  # at its end, or not at all
            after = one.samples if one.error <= paper.error else None
        told = "never" if after is None else f"{after:,.0f} samples"
        share = "" if after is None else f"{after / paper.samples:.2f}"
        lines.append(f"| {key} | {one.samples:,} | {one.seconds:.0f} | {one.error:.3f} | {told} | {share} |")
    return "\n".join(lines)


def plot(found: Mapping[str, Ended], path: Path) -> None:
    """The curves, and adapters as points."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, one in found.items():
        if one.curve:
            axes.plot(*zip(*one.curve, strict=True), label=name)
        else:
            axes.plot(one.samples, one.error, "o", label=name)
    axes.set(xlabel="samples", ylabel="score error", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", type=int, default=24_000)
    parser.add_argument("--num-images", type=int, default=64, help="of each style, to evaluate on")
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="these alone, and no table")
    args = parser.parse_args()
    compared = ways(args.samples)
    if unknown := set(args.ways or ()) - compared.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(compared)}")
    for name in args.ways or compared:
        run(name, compared[name], args.work, args.num_images)
    if not args.ways:
        found = {name: ended(args.work / name) for name in compared}
        print(table(found))
        plot(found, args.work / "curves.png")


if __name__ == "__main__":
    main()
