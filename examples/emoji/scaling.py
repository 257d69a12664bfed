"""What more teachers cost: merges of 4, 8, 16 and 32 hands at as many samples a style, and the paper's table beside.

    python scaling.py WORK                     every cell that is missing, then the tables
    python scaling.py WORK --look 16           the same, without FID and score error: for a core that has no hour
    python scaling.py WORK --cells 32-prompts  this alone, and no table: one process each, where there are cores

WORK holds what ``train_treated.py`` and ``train_judge.py --treated`` left there: ``treated/`` and ``judge-treated/``.
Adapters are calibrated, and LoRAs taken as they are (`train: none`); prompts are the paper's method, trained on
SAMPLES a style. Every cell is one `dmm merge` and one `dmm evaluate`, or with ``--look`` as many pictures of each style
that the judge looks at, beside the teacher's of the same noise; stopped in any way, the same command goes on.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image

from dmm.demo import story
from dmm.demo.assembly import expert_forms, experts
from dmm.demo.judge import Judge, judge_images
from dmm.errors import UserError
from dmm.evaluation.pairwise import psnr
from dmm.files.yaml import write_yaml
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import load_pipeline, set_style
from treatments import TREATED_STYLES

COUNTS = (4, 8, 16, 32)
METHODS = ("adapters", "prompts")
CELLS = tuple(f"{count}-{method}" for method in METHODS for count in COUNTS)
PAPERS = {  # FID to each teacher by the number of them: Table 2 of the answers to the paper's reviewers
    4: (9.5, 9.8, 9.5, 9.7),
    8: (9.6, 9.8, 9.6, 9.9, 9.8, 9.0, 9.8, 10.0),
    16: (9.6, 9.9, 9.7, 9.9, 9.9, 9.1, 9.8, 10.1, 9.9, 9.8, 9.8, 9.9, 9.5, 10.0, 9.9, 9.8),
}


def teachers_of(work: Path, count: int) -> list[dict[str, str]]:
    """The first ``count`` of all hands: the embedded experts, and then the treated ones' LoRAs.

    Raises: UserError: one of these is not there.
    """
    forms, paths = expert_forms(), experts()
    known = [
        {"name": name, ("lora" if forms[name] == "lora" else "model"): str(paths[name])} for name in story.styles()
    ]
    made = [
        {"name": name, "lora": str((work / "treated" / f"{name}.safetensors").resolve())} for name in TREATED_STYLES
    ]
    chosen = [*known, *made][:count]
    for teacher in chosen:
        path = teacher.get("lora") or teacher["model"]
        if not Path(path).exists():
            raise UserError(f"'{path}' is missing: make it with train_treated.py --work {work}.")
    return chosen


def recipe_of(work: Path, cell: str, samples: int, pictures: int = 100) -> dict[str, Any]:
    """The merge of one of :data:`CELLS`, on ``samples`` of each style where it is trained, and its ``pictures``."""
    number, method = cell.split("-")
    by_prompts = method == "prompts"
    training = dict((story.PAPER if by_prompts else story.ADAPTERS)["training"])
    if by_prompts:
        steps = max(1, samples * int(number) // training["batch_size"])
        training |= {"steps": steps, "warmup_steps": steps // 20}
    return {
        "base": str(experts()["base"]),
        "teachers": teachers_of(work, int(number)),
        "data": {"synthesize": {"prompts": story.PROMPTS_FILE, **story.DATA, "count": pictures}},
        "size": 32,
        "start": "average" if by_prompts else "base",
        "styles": {"rank": 0} if by_prompts else {"rank": 16, "train": "none"},
        "training": training,
        "losses": story.LOSSES,
        "checkpoint": {"every": 200, "keep": 1},
        "logging": {"every": 25, "sample_every": None},
    }


def run_cell(work: Path, cell: str, options: argparse.Namespace) -> None:
    """Merge and evaluate, as far as that has not been done."""
    folder = work / cell
    story.write_prompts(folder)
    recipe = recipe_of(work, cell, options.samples, options.pictures)
    (folder / story.RECIPE).write_text(write_yaml(recipe), encoding="utf-8")
    merged, spent = folder / "merged", folder / "seconds.json"
    seconds: dict[str, float] = json.loads(spent.read_text(encoding="utf-8")) if spent.exists() else {}
    for part in ("merge", "evaluate"):
        if part in seconds or (part == "evaluate" and (options.look or not options.num_images)):
            continue
        if part == "merge":
            words = [str(folder / story.RECIPE), "--output", str(merged), "--resume"]
        else:
            teachers = [f"--teacher={one['name']}={one.get('lora') or one['model']}" for one in recipe["teachers"]]
            words = [str(merged), *teachers, "--base", recipe["base"], "--num-images", str(options.num_images)]
            words += ["--extractor", f"judge={work / 'judge-treated'}", "--guidance", "2", "--steps", "15"]
            words += ["--output", str(folder / "report")]
        begun = _spent()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "dmm", part, *words], check=True, env=environment)
        seconds[part] = round(_spent() - begun, 1)
        spent.write_text(json.dumps(seconds) + "\n", encoding="utf-8")
    if options.look and not (folder / "look.json").exists():
        looked = look(work, merged, recipe["teachers"], options.look)
        (folder / "look.json").write_text(json.dumps(looked, indent=1) + "\n", encoding="utf-8")


def _spent() -> float:
    """Seconds of CPU time that finished commands took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def look(work: Path, merged: Path, teachers: Sequence[dict[str, str]], count: int) -> dict[str, dict[str, Any]]:
    """What the judge says of ``count`` pictures of each style by the merged model and by its teacher, by style.

    The teachers' pictures are kept in ``work/looks``: every cell looks at the same ones.
    """
    judge = Judge.from_pretrained(work / "judge-treated").eval()
    styles, concepts = list(judge.config.styles), list(judge.config.concepts)
    prompts = [concepts[i * len(concepts) // count % len(concepts)] for i in range(count)]
    asked = torch.tensor([concepts.index(prompt) for prompt in prompts])
    pipeline = load_pipeline(merged)

    def paint(one: Any) -> list[Image.Image]:
        return list(sample(one, prompts, range(count), steps=15, guidance_scale=2.0))

    (work / "looks").mkdir(exist_ok=True)
    looked = {}
    for teacher in teachers:
        kept = work / "looks" / f"{teacher['name']}-{count}.npy"
        if not kept.exists():
            loras = ((Path(teacher["lora"]), 1.0),) if "lora" in teacher else ()
            base = experts()["base"]
            source = ModelSource(base, loras=loras) if loras else ModelSource(teacher["model"], config=_config(teacher))
            np.save(kept, np.stack([np.asarray(one) for one in paint(open_pipeline(source))]))
        theirs = [Image.fromarray(one) for one in np.load(kept)]
        set_style(pipeline, teacher["name"])
        ours = paint(pipeline)
        told: dict[str, Any] = {}
        for who, pictures in (("teacher", theirs), ("student", ours)):
            verdict = judge_images(judge, pictures)
            taken = torch.bincount(verdict.style_logits.argmax(1), minlength=len(styles)) / count
            right = (verdict.concept_logits.argmax(1) == asked).float().mean().item()
            told[who] = {"taken_for": dict(zip(styles, taken.tolist(), strict=True)), "thing": right}
        pair = (torch.from_numpy(np.stack([np.asarray(one) for one in some])) for some in (ours, theirs))
        looked[teacher["name"]] = {**told, "psnr": psnr(*pair).mean().item()}
    return looked


def _config(teacher: dict[str, str]) -> Path | None:
    return None if Path(teacher["model"]).is_dir() else experts()["base"]


def looked_at(work: Path, cell: str) -> dict[str, str]:
    """The row of a cell that was looked at, by the table's columns."""
    looked = json.loads((work / cell / "look.json").read_text(encoding="utf-8"))
    first = list(looked)[: COUNTS[0]]

    def hand(name: str, who: str = "student") -> float:
        share: float = looked[name][who]["taken_for"][name]
        return 100 * share

    taken = {name: one["student"]["taken_for"] for name, one in looked.items()}
    return {
        "right hand, %": f"{mean(map(hand, looked)):.1f}",
        "its teachers', %": f"{mean(hand(name, 'teacher') for name in looked):.1f}",
        "most often taken for itself": f"{sum(max(one, key=one.get) == name for name, one in taken.items())}"
        f" of {len(looked)}",
        "right thing, %": f"{100 * mean(one['student']['thing'] for one in looked.values()):.1f}",
        "PSNR to the teacher, dB": f"{mean(one['psnr'] for one in looked.values()):.2f}",
        "of the first four": f"{mean(looked[name]['psnr'] for name in first):.2f}",
        **costs(work, cell, len(looked)),
    }


def costs(work: Path, cell: str, count: int) -> dict[str, str]:
    """What the styles take on disk, and the merge took."""
    added = sum(one.stat().st_size for one in (work / cell / "merged" / "styles").rglob("*") if one.is_file())
    seconds = json.loads((work / cell / "seconds.json").read_text(encoding="utf-8"))["merge"]
    return {"a style, KB": f"{added / count / 1000:.0f}", "CPU seconds of the merge": f"{seconds:.0f}"}


def row_of(work: Path, cell: str) -> dict[str, str]:
    """What a finished cell is worth, by the table's columns.

    FID and KID of a style are to its own teacher; the score error is on that teacher's own latents, a share of what
    parts the teacher from the base. The matrix is right in a row where the own teacher's entry is the smallest.
    """
    folder = work / cell
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    names: Sequence[str] = report["styles"]
    fids = report["fid_matrix"] or []
    distances = [row[i] for i, row in enumerate(fids)]
    own = report["score_error"]["own"]["by_style"]
    first = names[: COUNTS[0]]
    return {
        "FID to its own teacher": f"{mean(distances):.2f}" if distances else "-",
        "of the first four": f"{mean(distances[: len(first)]):.2f}" if distances else "-",
        "smallest on the diagonal": f"{sum(row[i] == min(row) for i, row in enumerate(fids))} of {len(names)}",
        "right hand, %": f"{mean(report['judged']['style']['student'].values()):.1f}",
        "its teachers', %": f"{mean(report['judged']['style']['teacher'].values()):.1f}",
        "score error": f"{mean(own.values()):.3f}",
        "of the first four's": f"{mean(own[name] for name in first):.3f}",
        **costs(work, cell, len(names)),
    }


def print_tables(work: Path) -> None:
    """Of the cells that are finished, and the paper's."""
    for made, read in (("report/report.json", row_of), ("look.json", looked_at)):
        rows = {cell: read(work, cell) for cell in CELLS if (work / cell / made).exists()}
        if not rows:
            continue
        columns = list(next(iter(rows.values())))
        print("| | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
        for cell, row in rows.items():
            number, method = cell.split("-")
            print(f"| {number}, {method} | " + " | ".join(row.values()) + " |")
        print()
    print("| the paper's, teachers | FID to its own teacher | of the first four |\n|---|---|---|")
    for count, fids in PAPERS.items():
        print(f"| {count} | {mean(fids):.2f} | {mean(fids[:4]):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cells", nargs="+", choices=CELLS, metavar="CELL", help="these alone, and no table")
    parser.add_argument("--samples", type=int, default=1125, help="of each style, with prompts")
    parser.add_argument("--num-images", type=int, default=400, help="of each style; 0: do not evaluate")
    parser.add_argument(
        "--pictures", type=int, default=story.DATA["count"], help="that each teacher paints to learn from"
    )
    parser.add_argument(
        "--look", type=int, default=0, metavar="N", help="instead of evaluating, look at N of each style"
    )
    options = parser.parse_args()
    try:
        for cell in options.cells or CELLS:
            run_cell(options.work, cell, options)
    except UserError as error:
        parser.error(str(error))
    if not options.cells:
        print_tables(options.work)


if __name__ == "__main__":
    main()
