"""Samples a second, TFLOP a second and peak memory of trainings of full size on one GPU; random weights, no network.

Each training is a part, in a process of its own with a time limit: one that fails, or runs out of memory, costs itself
alone. The parts come in the order of what they are worth; those for which no time is left are left out, and said.

  python benchmarks/gpu.py gpu-results                 nine minutes at most
  python benchmarks/gpu.py try --width 64 --size 64 --steps 2 --only sdxl-rank16-b4      narrow, on a CPU, to try it

FOLDER gets results.json, which is written anew after every part, and results.md, a table.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BUDGET = 530  # seconds
SWITCHES = ("compile", "gradient_checkpointing", "cudnn_benchmark", "profile")
PART = Path(__file__).with_name("gpu_part.py")


def part(shapes: str, rank: int, micro_batch: int, *, limit: int = 70, **options: Any) -> dict[str, Any]:
    """A training by its name; options are those of gpu_part.py."""
    name = "-".join([shapes, f"rank{rank}", f"b{micro_batch}", *(key.replace("_", "-") for key in options)])
    return {"name": name, "limit": limit, "shapes": shapes, "rank": rank, "micro_batch_size": micro_batch, **options}


PARTS = [
    part("sd15", 0, 20),
    part("sd15", 16, 20),
    part("sdxl", 16, 4),
    part("sd15", 0, 20, compile=True, limit=150),
    part("sdxl", 0, 8, gradient_checkpointing=True),
    part("sd15", 0, 20, profile=True),
    part("sd15", 0, 32),
    part("sd15", 0, 20, cudnn_benchmark=True),
    part("sd15", 16, 20, compile=True, limit=120),
    part("sdxl", 16, 8, gradient_checkpointing=True),
    part("sd15", 0, 64, gradient_checkpointing=True),
]


def run_part(one: dict[str, Any], args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What one part came to, or how it ended."""
    command = [sys.executable, str(PART), "--shapes", one["shapes"], "--rank", str(one["rank"])]
    command += ["--micro-batch-size", str(one["micro_batch_size"]), "--steps", str(args.steps)]
    command += ["--batch-size", str(args.micro_batches * one["micro_batch_size"])]
    command += [f"--{key.replace('_', '-')}" for key in SWITCHES if one.get(key)]
    for key in ("width", "size"):
        command += [f"--{key}", str(getattr(args, key))] if getattr(args, key) else []
    limit = min(args.limit or one["limit"], seconds)
    begun = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {**one, "error": f"more than {limit:.0f} s"}
    took = round(time.monotonic() - begun, 1)
    lines = done.stdout.strip().splitlines()
    try:
        return {**one, **json.loads(lines[-1]), "took": took}
    except (IndexError, ValueError):
        told = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        return {**one, "error": told[-300:], "took": took}


def table(results: list[dict[str, Any]]) -> str:
    """The results for people."""
    lines = ["| training | samples/s | TFLOP/s | peak memory |", "|---|---|---|---|"]
    for one in results:
        if "error" in one:
            lines.append(f"| {one['name']} | {one['error']} | | |")
            continue
        figures = f"{one['samples_per_second']:.3g} | {one['tflops_per_second']:.3g} | {one['peak_bytes'] / 1e9:.1f} GB"
        lines.append(f"| {one['name']} | {figures} |")
    devices = {one["device"] for one in results if "device" in one}
    return "\n".join([*lines, "", f"On {', '.join(sorted(devices)) or 'no device'}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6, help="of each; the first half warms up")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step: one of each teacher")
    parser.add_argument("--width", type=int, help="channels of the first block, to try it narrow; a multiple of 32")
    parser.add_argument("--size", type=int, help="pixels a side")
    parser.add_argument("--only", action="append", help="the names of parts")
    parser.add_argument("--limit", type=float, help="seconds of each, in place of its own")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget
    results: list[dict[str, Any]] = []
    for one in PARTS:
        if args.only and one["name"] not in args.only:
            continue
        left = end - time.monotonic()
        results.append(run_part(one, args, left) if left > 10 else {**one, "error": "no time was left"})
        (args.folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        (args.folder / "results.md").write_text(table(results), encoding="utf-8")
        print(table(results[-1:]).splitlines()[2], flush=True)
    print(f"\n{table(results)}\nWrote {args.folder}/results.json and {args.folder}/results.md.")


if __name__ == "__main__":
    main()
