"""What a command costs before it works: CPU seconds of refusals, imports, and a picture beside plain diffusers.

    OMP_NUM_THREADS=1 python benchmarks/commands.py [--pairs N]

Prints, with the target of each, and exits with 1 where one is missed:
- CPU seconds of help, and of refusals that need no model
- imports (python -X importtime) of these, and of a picture, in parts of what `import diffusers` takes
- a picture by `dmm generate` on an embedded expert : the same picture by plain diffusers, CPU time, imports included,
  in alternation; the median of paired ratios, with the lowest and the highest

Time is that of the processes themselves: other work on the machine does not count.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops

import dmm.demo
from dmm.models.libraries import quietly

MOST_SECONDS = 0.5
MOST_OF_DIFFUSERS = 1.3
PLAIN = """
import sys
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
picture = pipe("fox", num_inference_steps=25, guidance_scale=7, generator=torch.Generator().manual_seed(0)).images[0]
picture.save(sys.argv[2])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    with quietly():
        base = dmm.demo.experts()["base"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ours, theirs = folder / "dmm.png", folder / "diffusers.png"
        generate = [*DMM, "generate", str(base), "fox", "--device", "cpu", "--overwrite", "--output", str(ours)]
        plain = [sys.executable, "-c", PLAIN, str(base), str(theirs)]
        met = [*report_refusals(refusals(folder, base), folder)]
        report_imports({"by dmm generate": generate, "by plain diffusers": plain}, folder)
        pairs = [(cpu_seconds(generate, folder), cpu_seconds(plain, folder)) for _ in range(args.pairs)]
        met.append(report_pictures(pairs))
        highest = max(high for _, high in ImageChops.difference(Image.open(ours), Image.open(theirs)).getextrema())
    met.append(highest <= 1)
    print(f"  the two pictures differ by at most {highest} of 255 levels")
    return 0 if all(met) else 1


DMM = [sys.executable, "-m", "dmm"]


def refusals(folder: Path, base: Path) -> dict[str, list[str]]:
    """Commands that end at once, by what they show."""
    merged = folder / "merged"
    (merged / "styles").mkdir(parents=True)
    config = '{"_class_name": "StylePrompts", "names": ["ink", "photo"], "dim": 64}'
    (merged / "styles" / "config.json").write_text(config, encoding="utf-8")
    (merged / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"base: {base}\nteachers: []\ndata: {{}}\n", encoding="utf-8")
    (folder / "there.png").write_text("mine", encoding="utf-8")
    return {
        "dmm --help": ["--help"],
        "dmm generate --help": ["generate", "--help"],
        "dmm evaluate --help": ["evaluate", "--help"],
        "a style that there is none of": ["generate", str(merged), "fox", "--style", "inc"],
        "a mix that does not sum to 1": ["generate", str(merged), "fox", "--style", "ink=0.5,photo=0.6"],
        "an output that exists": ["generate", str(merged), "fox", "--output", str(folder / "there.png")],
        "a model that is not there": ["generate", "nowhere.safetensors", "fox"],
        "a recipe's mistake": ["merge", str(recipe), "--output", str(folder / "out")],
        "a style to export that there is none of": ["export", str(merged), "--style", "inc", "--output", "x"],
    }


def report_refusals(commands: dict[str, list[str]], folder: Path) -> list[bool]:
    print(f"CPU seconds, at most {MOST_SECONDS}; imports, in parts of `import diffusers`")
    whole = import_seconds([sys.executable, "-X", "importtime", "-c", "import diffusers"], folder)
    met = []
    for what, words in commands.items():
        seconds = min(cpu_seconds([*DMM, *words], folder) for _ in range(3))
        share = import_seconds([sys.executable, "-X", "importtime", "-m", "dmm", *words], folder) / whole
        met.append(seconds <= MOST_SECONDS)
        print(f"  {what:<42} {seconds:6.2f} s   {share:6.3f}   {'met' if met[-1] else 'MISSED'}")
    return met


def report_imports(painters: dict[str, list[str]], folder: Path) -> None:
    reference = import_seconds([sys.executable, "-X", "importtime", "-c", "import diffusers"], folder)
    print(f"imports of a picture, in parts of `import diffusers`, which takes {reference:.2f} s")
    for what, command in painters.items():
        seconds = import_seconds([command[0], "-X", "importtime", *command[1:]], folder)
        print(f"  {what:<42} {seconds:6.2f} s   {seconds / reference:6.3f}")


def report_pictures(pairs: Sequence[tuple[float, float]]) -> bool:
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    middle = statistics.median(ratios)
    seconds = " : ".join(f"{statistics.median(side):.2f}" for side in zip(*pairs, strict=True))
    verdict = "met" if middle <= MOST_OF_DIFFUSERS else "MISSED"
    print(
        f"a picture by dmm generate : by plain diffusers  {seconds} s = {middle:.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} pairs), at most {MOST_OF_DIFFUSERS}: {verdict}"
    )
    return middle <= MOST_OF_DIFFUSERS


def cpu_seconds(command: list[str], folder: Path) -> float:
    """The CPU time of a process and of those that it starts, whatever its exit status."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def import_seconds(command: list[str], folder: Path) -> float:
    """What a command's imports take, as ``-X importtime`` tells."""
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stderr
    lines = (line.removeprefix("import time:").split("|") for line in told.splitlines() if "import time:" in line)
    return sum(int(own) for own, *_ in lines if own.strip().isdecimal()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
