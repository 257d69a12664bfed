"""What each part of the method is worth, on the embedded experts: the paper's Tables 1 and 2 at small size.

    python ablations.py samples WORK --seeds 3      half of the pictures a style's own; noisy ones weighing more
    python ablations.py losses WORK --seeds 3       score; + features; + adversary; + synthesised fine-tuning
    python ablations.py second WORK --seeds 3       a second stage on teachers' pictures, and on the student's
    python ablations.py incremental WORK --seeds 3  4 styles; 8; 4 + 4 without regularisation, with it, in two stages
    python ablations.py adding WORK --seeds 3       8 styles; 7, and then one more in a quarter of the steps
    python ablations.py longer WORK --seeds 3       the same in four times as many, with twice as many pictures
    python ablations.py adapters WORK --quick       adapters by bytes and samples; plain LoRAs of as many bytes
    python ablations.py adversary WORK --seeds 10   whether the adversary's game goes well, seed by seed

Every arm is one `dmm merge` or `dmm add`, of the demo's length or a part or multiple of it, and one `dmm evaluate`;
its folder in WORK keeps both. Stopped in any way, the same command goes on; arms that are finished are not run again.
At the end the table is printed, as docs/results.md has it. Where there are many cores, each arm and seed can have a
process of its own before that: ``--arm KEY --seed S`` runs one and prints nothing.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dmm.demo import story
from dmm.demo.assembly import expert_forms, experts
from dmm.demo.judge import load_judge
from dmm.errors import UserError
from dmm.evaluation.extractor_names import check_count
from dmm.files.yaml import write_yaml
from dmm.formats.tensors import read_header

STEPS = story.PAPER["training"]["steps"]
HEAVY = {"feature": 0.1}
"""More than in the demo: features weighed this much when the first tables were made."""


@dataclass(frozen=True)
class Arm:
    """One run: its name, what is merged, what is otherwise than in the demo, and which arm it goes on from.

    Attributes:
        key: of its folder: arms of several tables that are the same run have one.
        start: the arm, by its key, whose model is trained further.
        earlier: the one to whose model the styles are added.
        rate: the learning rate, where it is not the demo's.
        rank: of adapters; 0: of style prompts, as in the paper.
        train: what of adapters is trained.
        plain: the adapters are the experts' differences, decomposed by nothing but themselves.
    """

    name: str
    key: str
    styles: Sequence[str]
    losses: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, float] = field(default_factory=dict)
    steps: float = 1.0
    start: str | None = None
    earlier: str | None = None
    regularization: float = 0.5
    rate: float | None = None
    rank: int = 0
    train: str = "adapters"
    plain: bool = False


def samples_arms() -> list[Arm]:
    names = story.styles()
    even, everyones = {**HEAVY, "noise_weighting": 0.0}, {"own": 0.0}
    return [
        Arm("all teachers' pictures", "plain", names, even, everyones),
        Arm("half its own", "own", names, even),
        Arm("noisy ones weigh more", "noisy", names, HEAVY, everyones),
        Arm("both", "heavy", names, HEAVY),
    ]


def losses_arms() -> list[Arm]:
    names = story.styles()
    full = {**HEAVY, "adversarial": 0.01}
    return [
        Arm("score", "score", names, {"feature": 0.0}),
        Arm("+ features", "heavy", names, HEAVY),
        Arm("+ adversary", "adversary", names, full),
        Arm("+ fine-tuning", "finetuned", names, full, {"own": 1, "seed": 1}, 0.25, "adversary", rate=3e-4),
    ]


def second_arms() -> list[Arm]:
    names = story.styles()

    def then(name: str, key: str, own: float, student: float) -> Arm:
        data = {"own": own, "student": student, "seed": 1}
        return Arm(name, key, names, {}, data, 1 / 3, "first", rate=1e-3)

    return [
        Arm("one stage, as long as both", "8", names),
        Arm("the first stage", "first", names, steps=2 / 3),
        then("then their own", "then-own", 0.8, 0.0),
        then("then half of these the student's", "then-student", 0.4, 0.4),
    ]


def incremental_arms() -> list[Arm]:
    names = story.styles()
    return [
        # as many samples of a style in each: in the paper, a teacher has a GPU of its own
        Arm("4", "4", names[:4], steps=0.5),
        Arm("8", "8", names),
        Arm("4 + 4, not regularised", "4-and-4-free", names[4:], steps=0.5, earlier="4", regularization=0.0),
        Arm(
            "4 + 4, regularised",
            "4-and-4",
            names[4:],
            data={"count": 200},
            steps=4,
            earlier="4",
            regularization=0.875,
            rate=1.5e-3,
        ),
        Arm(
            "and a second stage",
            "4-and-4-then",
            names[4:],
            data={"own": 0.4, "student": 0.4, "seed": 1},
            steps=2,
            start="4-and-4",
            earlier="4",
            regularization=0.75,
            rate=8e-4,
        ),
    ]


def adding_arms() -> list[Arm]:
    names = story.styles()
    return [
        Arm("8", "8", names),
        Arm("7", "7", names[:7], steps=0.875),
        Arm("7 + 1", "7-and-1", names[7:], steps=0.25, earlier="7", regularization=0.75, rate=1e-3),
    ]


def longer_arms() -> list[Arm]:
    names, data = story.styles(), {"count": 200}
    return [
        Arm("8", "8-longer", names, data=data, steps=4),
        Arm("7", "7-longer", names[:7], data=data, steps=3.5),
        Arm(
            "7 + 1",
            "7-and-1-longer",
            names[7:],
            data={**data, "own": 0.85},
            earlier="7-longer",
            regularization=0.8,
            rate=1e-3,
        ),
    ]


def adversary_arms() -> list[Arm]:
    return [Arm("+ adversary", "adversary", story.styles(), {**HEAVY, "adversarial": 0.01})]


def adapters_arms() -> list[Arm]:
    names = story.styles()
    arms = [Arm("rank 0, 9,000 samples", "8-short", names, steps=0.25), Arm("rank 0, 36,000", "8", names)]
    for rank in (2, 4, 8, 16):
        few = {"count": 1, "own": 0.0}  # nothing is learnt from them
        arms += [
            Arm(f"rank {rank}, plain", f"plain-{rank}", names, data=few, rank=rank, train="none", plain=True),
            Arm(f"rank {rank}, calibrated", f"rank-{rank}-none", names, rank=rank, train="none"),
            Arm(f"rank {rank}, 9,000 samples", f"rank-{rank}-short", names, steps=0.25, rank=rank),
            Arm(f"rank {rank}, 36,000", f"rank-{rank}", names, rank=rank),
        ]
    return arms


TABLES: dict[str, Callable[[], list[Arm]]] = {
    "samples": samples_arms,
    "losses": losses_arms,
    "second": second_arms,
    "incremental": incremental_arms,
    "adding": adding_arms,
    "longer": longer_arms,
    "adapters": adapters_arms,
    "adversary": adversary_arms,
}

FIGURES = ("FID", "score error")
"""That are told by style."""

COMPARED: dict[str, list[tuple[str, str, list[str]]]] = {
    "incremental": [
        (added, beside, styles)
        for added in ("4-and-4", "4-and-4-then")
        for beside, styles in (("4", story.styles()[:4]), ("8", story.styles()[4:]))
    ],
    "adding": [("7-and-1", "8", story.styles())],
    "longer": [("7-and-1-longer", "8-longer", story.styles())],
}
"""By table: an arm, the one that it is compared with, and in which styles."""


def folder_of(work: Path, key: str, seed: int) -> Path:
    return work / f"{key}-seed{seed}"


def run_arm(arm: Arm, work: Path, seed: int, options: argparse.Namespace) -> Path:
    """Train and evaluate one arm, as far as that has not been done; returns its folder."""
    folder = folder_of(work, arm.key, seed)
    folder.mkdir(parents=True, exist_ok=True)
    story.write_prompts(folder)
    recipe = folder / story.RECIPE
    recipe.write_text(write_yaml(recipe_of(arm, work, seed, options)), encoding="utf-8")
    merged = folder / "merged"
    if arm.plain and not (merged / "model_index.json").exists():
        extract_loras(arm, folder, options)
    command = ["add", str(folder_of(work, arm.earlier, seed) / "merged")] if arm.earlier else ["merge"]
    run_dmm(options, [*command, str(recipe), "--output", str(merged), "--resume"])
    if options.num_images and not (folder / "report" / "report.json").exists():
        settings = ["--num-images", str(options.num_images), "--extractor", "judge", "--guidance", "2", "--steps", "15"]
        settings += ["--precision", "fp32", *(["--quick"] if options.quick else [])]
        teachers = [f"--teacher={name}={experts()[name]}" for name in all_styles(arm)]
        base = ["--base", str(experts()["base"])]
        run_dmm(options, ["evaluate", str(merged), *teachers, *base, *settings, "--output", str(folder / "report")])
    return folder


def extract_loras(arm: Arm, folder: Path, options: argparse.Namespace) -> None:
    """What LoRA extraction everywhere else makes of the experts, where it has not been made."""
    base = str(experts()["base"])
    for teacher in teachers_of(arm):
        recipe, lora = folder / f"{teacher['name']}.yaml", lora_of(folder, teacher["name"])
        of_lora = {"model": base, "lora": teacher["lora"]} if "lora" in teacher else {"model": teacher["model"]}
        told = {"kind": "lora", "method": "extract", "base": base, "rank": arm.rank, "text_encoder": "base"}
        recipe.write_text(write_yaml({**told, "teachers": [{"name": teacher["name"], **of_lora}]}), encoding="utf-8")
        if not lora.exists():
            run_dmm(options, ["soup", str(recipe), "--output", str(lora)])


def lora_of(folder: Path, style: str) -> Path:
    return folder / f"{style}.safetensors"


def teachers_of(arm: Arm) -> list[dict[str, str]]:
    forms, paths = expert_forms(), experts()
    return [{"name": name, ("lora" if forms[name] == "lora" else "model"): str(paths[name])} for name in arm.styles]


def all_styles(arm: Arm) -> list[str]:
    """The styles that the arm's model has."""
    names = story.styles()
    return names[: names.index(arm.styles[-1]) + 1] if arm.earlier else list(arm.styles)


def recipe_of(arm: Arm, work: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    steps = round(options.steps * arm.steps)
    recipe: dict[str, Any] = {
        "base": str(experts()["base"]),
        "teachers": teachers_of(arm),
        "data": {"synthesize": {"prompts": story.PROMPTS_FILE, **story.DATA, **arm.data}},
        "size": 32,
        "styles": {"rank": 0},
        "training": {**story.PAPER["training"], "steps": steps, "warmup_steps": steps // 20},
        "losses": {**story.LOSSES, **arm.losses},
        "checkpoint": {"every": 200, "keep": 1},
        "logging": {"every": 25, "sample_every": None, "score_error_every": 250},
        # of its own in a second stage, or that would draw the first one's noise again
        "seed": seed + (10 if arm.start else 0),
    }
    if arm.rank:
        own = round(steps / len(arm.styles))  # of each style, trained by itself
        recipe["styles"] = {"rank": arm.rank, "train": arm.train}
        recipe["training"] = {**story.ADAPTERS["training"], "steps": own, "warmup_steps": own // 20}
    if arm.plain:
        folder = folder_of(work, arm.key, seed)
        recipe["teachers"] = [{"name": name, "lora": str(lora_of(folder, name))} for name in arm.styles]
        recipe["styles"]["samples"] = 1
    if arm.earlier:
        recipe["earlier"] = {"regularization": arm.regularization}
    else:
        recipe["start"] = "base" if arm.rank else "average"
    if arm.start:
        recipe["start"] = str(folder_of(work, arm.start, seed) / "merged")
    if arm.rate:
        recipe["training"]["learning_rate"] = arm.rate
    return recipe


def run_dmm(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """One dmm command, in as many processes as were asked for."""
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}", "-m"]
    module = [*(launch if options.processes > 1 else []), "dmm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *module, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)


def read_report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    return report


def share_of(folder: Path) -> float:
    """The numbers of a style's adapter in per cent of the UNet's, on average."""
    index = folder / "merged" / "styles" / "adapters.json"
    if not index.is_file():
        return 0.0
    adapters = json.loads(index.read_text(encoding="utf-8"))["adapters"].values()
    weights = read_header(folder / "merged" / "unet" / "diffusion_pytorch_model.safetensors").tensors.values()
    return 100 * mean(one["parameters"] for one in adapters) / sum(math.prod(one.shape) for one in weights)


def told(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean over seeds, and their standard deviation where there are several."""
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread


def print_table(arms: Sequence[Arm], work: Path, seeds: Sequence[int], *, quick: bool) -> None:
    """For every arm, over seeds; without FIDs, which a quick look does without."""
    figures: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
        "FIDt": ("{:.2f}", lambda report: report["fidt"]),
        "its reference": ("{:.2f}", lambda report: report["fidt_reference"]),
        "right hand, %": ("{:.1f}", lambda report: mean(report["judged"]["style"]["student"].values())),
        "right thing, %": ("{:.1f}", lambda report: mean(report["judged"]["concept"]["student"].values())),
        "score error, all experts' latents": ("{:.3f}", lambda report: report["score_error"]["mean"]),
        "its own expert's": ("{:.3f}", lambda report: report["score_error"]["own"]["mean"]),
        "PSNR, dB": ("{:.2f}", lambda report: report["pairwise"]["psnr"]["mean"]["value"]),
    }
    if quick:
        del figures["FIDt"], figures["its reference"]
    sizes = ["a style, % of the UNet"] if any(arm.rank for arm in arms) else []
    print("| | " + " | ".join([*sizes, *figures]) + " |\n|---" + "|---" * len([*sizes, *figures]) + "|")
    for arm in arms:
        folders = [folder_of(work, arm.key, seed) for seed in seeds]
        reports = [read_report(folder) for folder in folders]
        cells = [told([share_of(folder) for folder in folders], "{:.1f}")] if sizes else []
        cells += [told([read(report) for report in reports], form) for form, read in figures.values()]
        print(f"| {arm.name} | " + " | ".join(cells) + " |")


def print_by_style(arms: Sequence[Arm], work: Path, seeds: Sequence[int], figure: str) -> None:
    """One figure of every style, over seeds."""
    names = story.styles()
    print(f"| {figure} | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for arm in arms:
        reports = [read_report(folder_of(work, arm.key, seed)) for seed in seeds]
        cells = []
        for name in names:
            values = [by_style(one, figure)[name] for one in reports if name in one["styles"]]
            cells.append(told(values, "{:.2f}") if values else "-")
        print(f"| {arm.name} | " + " | ".join(cells) + " |")


def print_growth(arm: Arm, beside: Arm, styles: Sequence[str], work: Path, seeds: Sequence[int]) -> None:
    """How much larger an arm's FIDs are than another's, style by style, and what of that is noise; its score errors.

    Noise is 2 % of the other's FID, or two standard deviations of it over seeds where these are more; with both arms',
    two standard deviations of what the difference of two single runs would be.
    """

    def over_seeds(one: Arm, figure: str, style: str) -> list[float]:
        return [by_style(read_report(folder_of(work, one.key, seed)), figure)[style] for seed in seeds]

    print(f"| {arm.name}, beside {beside.name} | FID grows by | noise | with both arms' | score error grows |")
    print("|---|---|---|---|---|")
    for style in styles:
        fids, others = (over_seeds(one, "FID", style) for one in (arm, beside))
        errors, other_errors = (over_seeds(one, "score error", style) for one in (arm, beside))
        own, other = (stdev(values) if len(seeds) > 1 else 0.0 for values in (fids, others))
        noise, both = (max(0.02 * mean(others), 2 * spread) for spread in (other, math.hypot(own, other)))
        growth, times = mean(fids) - mean(others), mean(errors) / mean(other_errors)
        print(f"| {style} | {growth:+.2f} | {noise:.2f} | {both:.2f} | {times:.2f} times |")


def by_style(report: dict[str, Any], figure: str) -> dict[str, float]:
    if figure == "score error":
        errors: dict[str, float] = report["score_error"]["by_style"]
        return errors
    return {name: report["fid_matrix"][i][i] for i, name in enumerate(report["styles"])}


def print_game(work: Path, arm: Arm, seeds: Sequence[int]) -> None:
    """How the adversary's game ended, for every seed."""
    print("| seed | score | score error | adversarial | discriminator | right on student | right on teacher |")
    print("|---|---|---|---|---|---|---|")
    for seed in seeds:
        log = (folder_of(work, arm.key, seed) / "merged" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads(log[-1])
        names = ("score", "score_error", "adversarial", "discriminator")
        accuracies = ("discriminator_student_accuracy", "discriminator_teacher_accuracy")
        print(f"| {seed} | " + " | ".join(f"{last[name]:.4f}" for name in (*names, *accuracies)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--arm", metavar="KEY", help="run this one alone, named as its folder is")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of that one")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a whole training, of 40 samples each")
    parser.add_argument("--num-images", type=int, default=400, help="of each style; 0: do not evaluate")
    parser.add_argument("--quick", action="store_true", help="evaluate without FID, on as few pictures as you like")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.num_images and not options.quick:  # what evaluations would refuse after hours of training
        try:
            check_count(options.num_images, sum(load_judge().config.channels), "judge")
        except UserError as error:
            parser.error(str(error))
    arms, seeds = TABLES[options.table](), range(options.seeds)
    if options.arm:
        for arm in (one for one in arms if one.key == options.arm):
            run_arm(arm, options.work, options.seed, options)
        return
    for seed in seeds:
        for arm in arms:
            print(f"{arm.name}, seed {seed}", file=sys.stderr, flush=True)
            run_arm(arm, options.work, seed, options)
    samples = options.steps * story.PAPER["training"]["batch_size"]
    print(f"{samples:,} samples a merge, {options.num_images} pictures of a style, {len(seeds)} seeds.\n")
    if options.num_images:
        print_table(arms, options.work, seeds, quick=options.quick)
    if options.table in COMPARED and options.num_images:
        for figure in FIGURES:
            print()
            print_by_style(arms, options.work, seeds, figure)
        by_key = {arm.key: arm for arm in arms}
        for key, other, styles in COMPARED[options.table]:
            print()
            print_growth(by_key[key], by_key[other], styles, options.work, seeds)
    if options.table == "adversary":
        print()
        print_game(options.work, arms[0], seeds)


if __name__ == "__main__":
    main()
