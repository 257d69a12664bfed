"""The story that ``dmm demo`` tells: experts become one model, which then paints beside them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dmm.demo.assembly import COLLECTIONS, expert_forms, expert_sources, experts
from dmm.demo.judge import Judge, judge_images, load_judge
from dmm.errors import UserError
from dmm.families import FAMILIES
from dmm.files.pictures import grid, save_png
from dmm.files.yaml import write_yaml
from dmm.models.teachers import open_pipeline
from dmm.pipeline.sampling import sample
from dmm.pipeline.styled import load_pipeline, set_style

PROMPTS = ("fox", "red apple", "octopus", "rocket", "palm tree", "robot")
GUIDANCE_SCALE = 2.0
RECIPE, PROMPTS_FILE, MERGED, PICTURE = "recipe.yaml", "prompts.txt", "merged", "demo.png"

DATA: dict[str, Any] = {"count": 100, "steps": 12, "guidance": GUIDANCE_SCALE, "own": 0.5}
_COUNT_OF_LORAS = 16
_TRAINING = {"batch_size": 40, "micro_batch_size": 40, "lr_schedule": "cosine", "precision": "fp32"}
ADAPTERS: dict[str, Any] = {
    "start": "base",
    "styles": {"rank": 16},
    # of each style whose expert is no LoRA, which is taken as it is; two cores manage all of it in three minutes
    "training": {**_TRAINING, "steps": 56, "learning_rate": 5.0e-4, "warmup_steps": 2},
}
"""The merge that users get: styles are adapters on the base."""
PAPER: dict[str, Any] = {
    "start": "average",
    "styles": {"rank": 0},
    # 36,000 samples in five minutes or so. The rate is two hundred times the paper's, as suits a model a
    # four-hundredth of the size
    "training": {**_TRAINING, "steps": 900, "learning_rate": 2.0e-3, "warmup_steps": 50},
}
"""The paper's merge: styles are prompts, and all weights are trained."""
# features count for more than in the paper, as they should on so short a way; an adversary would come too late. Where
# noise is high it is settled whose hand a picture is in, and there predictions of noise differ little
LOSSES = {"feature": 0.03, "adversarial": 0.0, "noise_weighting": 0.5}


@dataclass(frozen=True)
class Verdict:
    """What the judge says of some pictures.

    Attributes:
        right_styles, right_concepts: how many are in the hand, and of the thing, that was asked for.
    """

    right_styles: int
    right_concepts: int


@dataclass(frozen=True)
class Show:
    """What the demo has to show.

    Attributes:
        picture: for every prompt, a row by the experts and under it one by the merged model.
        num_images: of each of the two.
    """

    picture: Path
    num_images: int
    of_experts: Verdict
    of_merged: Verdict


def styles(family: str = COLLECTIONS[0]) -> list[str]:
    """The experts of a family that are merged: those that the judge knows.

    A twin of one that predicts velocity is left out: what adapters begin with are differences of weights, and those of
    two predictions differ in more than their hands.
    """
    known: list[str] = load_judge().config.styles
    return [name for name in experts(family) if name in known]


def write_recipe(folder: Path, method: Mapping[str, Any] = ADAPTERS, *, family: str = COLLECTIONS[0]) -> Path:
    """Write the recipe of the merge, and the prompts that the experts paint for it.

    Args:
        folder: is made where it is missing.
        method: :data:`ADAPTERS` or :data:`PAPER`.
        family: of the experts.
    Returns: the recipe.
    """
    paths, forms = experts(family), expert_forms(family)
    teachers = [
        {"name": name, ("lora" if forms[name] == "lora" else "model"): str(paths[name])} for name in styles(family)
    ]
    data = dict(DATA)
    if method["styles"]["rank"] and all(forms[name] == "lora" for name in styles(family)):
        # LoRAs are taken as they are, and only looked at on what they paint
        data["count"] = min(data["count"], _COUNT_OF_LORAS)
    recipe = {
        "base": str(paths["base"]),
        "teachers": teachers,
        "data": {"synthesize": {"prompts": PROMPTS_FILE, **data}},
        "size": 32,
        **method,
        "losses": LOSSES | ({"noise_weighting": 0.0} if FAMILIES[family].is_flow else {}),
        "checkpoint": {"every": 100, "keep": 1},
        "logging": {"every": 50, "sample_every": None},
    }
    write_prompts(folder)
    (folder / RECIPE).write_text(write_yaml(recipe), encoding="utf-8")
    return folder / RECIPE


def write_prompts(folder: Path) -> None:
    """Write what the experts paint: everything that they know."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROMPTS_FILE).write_text("".join(f"{one}\n" for one in load_judge().config.concepts), encoding="utf-8")


def merge_experts(folder: Path) -> None:
    """Merge by the recipe in ``folder``, on the CPU, in processes of their own; goes on with a merge that has begun.

    Two processes where there are two cores: more than that share too little work.

    Raises: UserError: the merge did not end well, and has said why; KeyboardInterrupt: it was interrupted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_processes = 1 if sys.platform == "win32" else min(2, cores)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = ["-m", "dmm", "merge", str(folder / RECIPE), "--output", str(folder / MERGED), "--resume"]
    # a thread a process: the models are too small for more; and without a GPU, on which less would be shown
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [sys.executable, *(launch if num_processes > 1 else []), *command], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)  # it saves where it is
        process.wait()
        raise
    if status:
        raise UserError(f"The merge ended with status {status}; run dmm demo again to go on.")


def show(folder: Path, progress: Callable[[float], object] | None = None, *, family: str = COLLECTIONS[0]) -> Show:
    """Let the experts and the merged model paint :data:`PROMPTS`, from the same noise, into one picture.

    Args:
        progress: called with the number of pictures that were painted, which need not be whole.
    Raises: UserError: the picture cannot be written.
    """
    judge, names, sources = load_judge(), styles(family), expert_sources(family)
    merged = load_pipeline(folder / MERGED)

    def paint(pipeline: Any) -> list[Image.Image]:
        seeds = range(len(PROMPTS))
        return list(sample(pipeline, PROMPTS, seeds, guidance_scale=GUIDANCE_SCALE, progress=progress))

    by_experts, by_merged = [], []
    for name in names:
        by_experts.append(paint(open_pipeline(sources[name])))
        set_style(merged, name)
        by_merged.append(paint(merged))
    rows = [column[i] for i in range(len(PROMPTS)) for columns in (by_experts, by_merged) for column in columns]
    labels = [label for prompt in PROMPTS for label in (prompt, "merged")]
    picture = grid(rows, len(names), row_labels=labels, column_labels=names)
    save_png(picture, folder / PICTURE)
    verdicts = (_judged(judge, names, columns) for columns in (by_experts, by_merged))
    return Show(folder / PICTURE, len(PROMPTS) * len(names), *verdicts)


def num_pictures(family: str = COLLECTIONS[0]) -> int:
    """How many pictures :func:`show` paints."""
    return 2 * len(PROMPTS) * len(styles(family))


def _judged(judge: Judge, names: list[str], columns: list[list[Image.Image]]) -> Verdict:
    right_styles = right_concepts = 0
    for name, pictures in zip(names, columns, strict=True):
        verdict = judge_images(judge, pictures)
        right_styles += sum(judge.config.styles[i] == name for i in verdict.style_logits.argmax(1).tolist())
        concepts = [judge.config.concepts[i] for i in verdict.concept_logits.argmax(1).tolist()]
        right_concepts += sum(a == b for a, b in zip(concepts, PROMPTS, strict=True))
    return Verdict(right_styles, right_concepts)
