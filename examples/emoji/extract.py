"""How near a LoRA of the same bytes is to the expert that it was extracted from: plain, and calibrated.

    python examples/emoji/extract.py WORK [--styles noto twemoji] [--ranks 4 8 16]

Prints the score error of the base with the LoRA on it, on pictures that the expert paints from other seeds; 0 is the
expert, 1 the base. What a LoRA does not carry (biases and norms) is missing in both.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmm.data import Synthesis, prepare_data
from dmm.demo import story
from dmm.demo.assembly import expert_sources, experts
from dmm.evaluation.score_error import score_error
from dmm.models.libraries import quiet_libraries
from dmm.models.styles import StylePrompts
from dmm.models.teachers import ModelSource, open_pipeline
from dmm.pipeline.styled import add_styles
from dmm.soup.cook import cook
from dmm.soup.recipe import SoupRecipe

NUM_LATENTS, DRAWS_PER_ROW = 32, 4
SEED = 2**40
"""Of what is measured on: far from those of calibrations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where the LoRAs are kept")
    parser.add_argument("--styles", nargs="+", default=["noto", "noto-blob", "twemoji", "fluent"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16])
    args = parser.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    story.write_prompts(args.work)
    prompts = args.work / story.PROMPTS_FILE
    calibration = {"prompts": str(prompts), "count": 32, "steps": 12, "guidance": story.GUIDANCE_SCALE}
    print("| | rank | bytes | plain | calibrated | ratio |\n|---|---|---|---|---|---|")
    for style in args.styles:
        source, base = expert_sources()[style], expert_sources()["base"]
        teacher = {"name": style, "model": str(source.model)}
        for rank in args.ranks:
            errors = {}
            kinds: dict[str, dict[str, Any]] = {"plain": {}, "calibrated": {"calibration": calibration}}
            for name, more in kinds.items():
                path = args.work / f"{style}-{rank}-{name}.safetensors"
                told: dict[str, Any] = {"base": str(experts()["base"]), "teachers": [teacher], "rank": rank, **more}
                if not path.exists():
                    cook(SoupRecipe(kind="lora", method="extract", text_encoder="base", **told), path)
                lora = ModelSource(base.model, loras=((path, 1.0),))
                errors[name] = error_of(lora, source, base, style, prompts)
            ratio = errors["calibrated"] / errors["plain"]
            size = path.stat().st_size
            cells = f"{size:,} | {errors['plain']:.3f} | {errors['calibrated']:.3f} | {ratio:.2f}"
            print(f"| {style} | {rank} | {cells} |", flush=True)


@torch.no_grad()
def error_of(model: ModelSource, expert: ModelSource, base: ModelSource, style: str, prompts: Path) -> float:
    """The score error of a model beside an expert, on what the expert paints."""
    ours, theirs, start = (open_pipeline(one) for one in (model, expert, base))
    # a model of one style, that changes nothing: what is measured are models with styles
    add_styles(ours, StylePrompts([style], 0))
    lines = prompts.read_text(encoding="utf-8").splitlines()
    synthesis = Synthesis(lines, NUM_LATENTS, steps=25, guidance_scale=story.GUIDANCE_SCALE, seed=SEED)
    data = prepare_data(synthesis, start, {style: partial(open_pipeline, expert)}, size=32, show_progress=False)
    rows = {style: torch.arange(data.num_rows)}
    found = score_error(ours, {style: theirs}, start, data, rows, draws_per_row=DRAWS_PER_ROW)
    return found.mean


if __name__ == "__main__":
    main()
