"""The story that ``dmm demo`` tells: the same prompts, from the same noise, by the base and by every expert."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dmm.demo.assembly import expert_sources
from dmm.demo.judge import judge_images, load_judge
from dmm.outputs import new_folder
from dmm.pictures import grid, save_png
from dmm.sampling import sample
from dmm.teachers import open_pipeline

PROMPTS = ("fox", "red apple", "octopus", "rocket", "palm tree", "robot", "hamburger", "jack-o-lantern")
TWIN = "noto-v"  # shown by its twin
GUIDANCE_SCALE = 2.0
GRID = "experts.png"


@dataclass(frozen=True)
class ExpertShow:
    """What the demo has to show.

    Attributes:
        grid: the picture, prompts down, base and experts across.
        right_styles, right_concepts: how many of the experts' ``num_images`` pictures the judge takes
            for the expert's hand, and for the thing that was asked for.
    """

    grid: Path
    right_styles: int
    right_concepts: int
    num_images: int


def show_experts(folder: Path, progress: Callable[[float], object] | None = None) -> ExpertShow:
    """Let every expert paint :data:`PROMPTS`, and lay the pictures side by side in ``folder``.

    Args:
        folder: made here; it appears when everything is done.
        progress: called with the number of pictures that were painted, which need not be whole.
    Raises: UserError: the folder holds something, or cannot be written.
    """
    judge = load_judge()
    columns: dict[str, list[Image.Image]] = {}
    right_styles = right_concepts = 0
    with new_folder(folder) as building:
        for name, source in expert_sources().items():
            if name == TWIN:
                continue
            pipeline = open_pipeline(source)
            seeds = range(len(PROMPTS))
            pictures = sample(pipeline, PROMPTS, seeds, guidance_scale=GUIDANCE_SCALE, progress=progress)
            columns[name] = list(pictures)
            if name in judge.config.styles:
                verdict = judge_images(judge, columns[name])
                styles = [judge.config.styles[i] for i in verdict.style_logits.argmax(1).tolist()]
                concepts = [judge.config.concepts[i] for i in verdict.concept_logits.argmax(1).tolist()]
                right_styles += styles.count(name)
                right_concepts += sum(a == b for a, b in zip(concepts, PROMPTS, strict=True))
        rows = [picture for row in zip(*columns.values(), strict=True) for picture in row]
        picture = grid(rows, len(columns), row_labels=PROMPTS, column_labels=list(columns))
        save_png(picture, building / GRID)
    num_images = len(PROMPTS) * len(judge.config.styles)
    return ExpertShow(folder / GRID, right_styles, right_concepts, num_images)


def num_pictures() -> int:
    """How many pictures :func:`show_experts` paints."""
    return len(PROMPTS) * (len(expert_sources()) - 1)
