"""Measure how faithful a merged model is to its teachers.

Every style is painted by the student and, twice, by its teacher. DIR gets

  report.html      to look at: everything below on one page
  report.json      all figures, with settings, sources and versions
  fid_matrix.png   FID of every style from every teacher, beside the teachers' own
  grid.png         the student's pictures under the teachers', from the same noise
  score_error.png  how far the student's predictions are off, by timestep

The teachers are those of all styles, as far as the recipes of the merge and of those before it, and the model itself,
know them; or only those that --teacher names. A stock model can be evaluated too: it paints the same in every style
(the base, a weighted average), or is the one teacher's (--teacher ink=models/ink).

Of merged ControlNets, DIR gets report.json alone: how far what each control gives to the model is from what its teacher
gives, on pictures that the base paints.

--quick looks at a few dozen pictures and does without FID and fid_matrix.png, which need many.

Pictures are kept in a cache, by what they were made from: stopped in any way, the same command goes on, and a second
evaluation paints only what has changed. Several processes share the work: torchrun, or accelerate launch on GPUs.

Examples:
  dmm evaluate merged --num-images 1000 --extractor judge --output report       # the embedded experts
  dmm evaluate merged --quick --extractor judge --output look                   # a first look, within minutes
  dmm evaluate merged --prompts coco.txt --extractor inception=weights.pth --output report
  dmm evaluate merged --prompts coco.txt --teacher ink=models/ink --teacher photo=photo.safetensors --output report
  dmm evaluate merged --prompts coco.txt --mix ink=0.5,photo=0.5 --score clip --score pickscore --output report
  torchrun --nproc-per-node=8 -m dmm evaluate merged --prompts coco.txt --output report
  dmm evaluate controls --prompts coco.txt --output report                      # merged ControlNets
  dmm compare report other-report --output comparison
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmm.cli.arguments import add_device, read_scaled_path
from dmm.cli.evaluate_controls import run_controls
from dmm.cli.hardware import check_device
from dmm.cli.opening import check_path, check_there
from dmm.cli.style_options import read_mix
from dmm.errors import UserError
from dmm.evaluation.extractor_names import NUM_FEATURES, check_count, check_quick_count, read_extractor
from dmm.files.cache import cache_folder
from dmm.files.outputs import check_new_folder
from dmm.files.prompts import read_prompts
from dmm.files.runs import holds_net
from dmm.maths.mixes import check_name
from dmm.models.style_names import read_style_names
from dmm.pipeline.samplers import check_multiple, check_settings
from dmm.training.ranks import told_once

if TYPE_CHECKING:
    from dmm.evaluation.sources import Models

GUIDANCE_SCALE = 7.0
NUM_IMAGES, NUM_QUICK_IMAGES = 5000, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MERGED", help="a merged model, or a stock one")
    parser.add_argument(
        "--teacher",
        metavar="NAME=PATH[:SCALE]",
        dest="teachers",
        type=_teacher,
        action="append",
        default=[],
        help="of the style NAME: a folder, a single file, a hub id, or a LoRA of the base; once for each style "
        "(default: those that the merge's recipes and the model itself know of all its styles); what the recipe says "
        "of that teacher, such as a LoRA's scale, holds unless SCALE is given",
    )
    parser.add_argument("--base", metavar="MODEL", help="that the teachers were trained from (default: the recipe's)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="of the report")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in DIR")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="what to paint, one a line (default, with the judge: what it knows)",
    )
    parser.add_argument(
        "--num-images",
        metavar="N",
        type=int,
        help=f"of each style (default: {NUM_IMAGES}, the paper's; {NUM_QUICK_IMAGES} with --quick)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="grid, pairs, KID and score error of a few dozen pictures, without FID, which needs many",
    )
    parser.add_argument(
        "--extractor",
        metavar="NAME[=WEIGHTS]",
        default="inception",
        help="what pictures are compared in: inception, clip, dino or judge (default: inception)",
    )
    parser.add_argument(
        "--mix",
        metavar="A=W,B=W",
        dest="mixes",
        type=read_mix,
        action="append",
        default=[],
        help="also compare this mix with weighted merging of its teachers, by --score; may be given several times",
    )
    parser.add_argument(
        "--score",
        metavar="NAME[=WEIGHTS]",
        dest="scores",
        action="append",
        default=[],
        help="of mixes: clip, pickscore, aesthetic, or a plug-in; may be given several times",
    )
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of all noise (default: 0)")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="where pictures are kept (default: the user's cache)")
    painting = parser.add_argument_group("how to paint")
    painting.add_argument("--steps", metavar="N", type=int, default=25, help="denoising steps (default: 25)")
    painting.add_argument(
        "--guidance", metavar="G", type=float, help="guidance scale; 1 is none (default: the recipe's, or 7)"
    )
    painting.add_argument("--negative", metavar="TEXT", default="", help="what to lead away from (default: nothing)")
    painting.add_argument("--width", metavar="W", type=int, help="pixels (default: the model's own)")
    painting.add_argument("--height", metavar="H", type=int, help="pixels (default: the model's own)")
    painting.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), help="of the weights (default: fp16 on a GPU, bf16 on a CPU)"
    )
    add_device(painting)
    painting.add_argument("--allow-pickle", action="store_true", help="open .ckpt and .bin files too")


def run(args: argparse.Namespace) -> None:
    """Evaluate, write the report, and say what was found and written.

    Raises: UserError: see :func:`dmm.evaluation.evaluate.evaluate`; KeyboardInterrupt: with a word on how to go on.
    """
    if holds_net(Path(args.model).expanduser()):
        run_controls(args)
        return
    with told_once():
        prompts = _check(args)
    from dmm.models.libraries import quiet_libraries

    quiet_libraries()
    from dmm.training.processes import claimed_by_main, join_processes, on_main

    join_processes(args.device)
    with claimed_by_main(args.output):
        on_main(lambda: check_new_folder(args.output, overwrite=args.overwrite))
        _evaluate(args, prompts)


def _evaluate(args: argparse.Namespace, prompts: list[str] | None) -> None:
    start = time.monotonic()
    import torch
    from accelerate import PartialState

    from dmm.evaluation.evaluate import Protocol, evaluate
    from dmm.evaluation.extractors import JudgeExtractor, open_extractor
    from dmm.evaluation.known_teachers import NamedTeacher
    from dmm.evaluation.painting import Painting
    from dmm.evaluation.preference import open_scorer
    from dmm.evaluation.sources import find_models
    from dmm.report.report import write_report

    state = PartialState()
    with told_once():
        extractor = open_extractor(args.extractor, state.device)
        scorers = [open_scorer(text, state.device) for text in args.scores]
        if prompts is None:
            assert isinstance(extractor, JudgeExtractor)  # of others _check has seen to prompts
            prompts = extractor.concepts
        named = {name: NamedTeacher(path, scale) for name, (path, scale) in args.teachers}
        models = find_models(args.model, named, args.base, state.device, allow_pickle=args.allow_pickle)
    for note in models.notes if state.is_main_process else ():
        print(f"dmm: note: {note}", file=sys.stderr)
    precision = args.precision or ("bf16" if state.device.type == "cpu" else "fp16")
    protocol = Protocol(
        prompts,
        _num_images(args),
        Painting(
            steps=args.steps,
            guidance_scale=_guidance(models) if args.guidance is None else args.guidance,
            negative_prompt=args.negative,
            width=args.width,
            height=args.height,
            precision=precision,
        ),
        args.seed,
        with_fid=not args.quick,
    )
    cache = args.cache or cache_folder("evaluation")
    try:
        evaluation = evaluate(
            models.student,
            models.teachers,
            extractor,
            protocol,
            cache,
            base=models.base,
            mixes=args.mixes,
            scorers=scorers,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The device ran out of memory: give a smaller --width and --height, or --precision fp16."
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on; what was painted is kept") from None
    if state.is_main_process:
        write_report(evaluation, args.output, overwrite=args.overwrite)
        print(_told(evaluation.figures, args.output, time.monotonic() - start))


def _check(args: argparse.Namespace) -> list[str] | None:
    """What can be checked before anything heavy is imported; the prompts, where a file is named."""
    check_there(args.model)
    check_device(args.device)
    check_new_folder(args.output, overwrite=args.overwrite)
    check_settings(steps=args.steps, guidance_scale=args.guidance or GUIDANCE_SCALE, negative_prompt=args.negative)
    for name, size in (("width", args.width), ("height", args.height)):
        if size is not None:
            check_multiple(name, size, 8)
    num_images = _num_images(args)
    if num_images < 1:
        raise UserError(f"--num-images must be at least 1, not {num_images}.")
    extractor, weights = read_extractor(args.extractor)
    if args.quick:
        check_quick_count(num_images)
    elif weights is None:  # of others it is seen once they are open
        check_count(num_images, NUM_FEATURES[extractor], extractor)
    if bool(args.mixes) != bool(args.scores):
        raise UserError("--mix says what is painted and --score how it is judged: give both or neither.")
    for package in ("matplotlib", "torchmetrics"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"Evaluation needs {package}, which is not installed: pip install 'dmm[evaluate]'.")
    names = [name for name, _ in args.teachers]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--teacher names '{name}' twice; every style has one teacher.")
    styles = read_style_names(args.model) or ()  # a stock model paints the same in any
    for name in [*names, *(name for mix in args.mixes for name in mix)] if styles else ():
        check_name(styles, name)
    for _, (path, _) in args.teachers:  # a model, or a LoRA on the base
        check_path(path)
    if args.base:
        check_there(args.base)
    if args.prompts is None and extractor != "judge":
        raise UserError("--prompts FILE is missing: name a file with what to paint, one prompt a line.")
    return None if args.prompts is None else read_prompts(args.prompts)


def _num_images(args: argparse.Namespace) -> int:
    if args.num_images is not None:
        return int(args.num_images)
    return NUM_QUICK_IMAGES if args.quick else NUM_IMAGES


def _guidance(models: "Models") -> float:
    if models.recipe is None:
        return GUIDANCE_SCALE
    painted = models.recipe.data.synthesize
    return painted.guidance if painted else models.recipe.logging.sample_guidance


def _told(figures: dict[str, Any], folder: Path, seconds: float) -> str:
    lines = [f"Wrote {folder}/report.html and report.json in {seconds:.0f} s."]
    if figures["fidt"] is not None:
        lines.append(
            f"  FIDt: {figures['fidt']:.4g}, the teachers' own {figures['fidt_reference']:.4g} "
            f"({figures['fidt_gap_percent']:+.1f} %)"
        )
    else:
        student, reference = (figures["kid"][who]["mean"]["value"] for who in ("student", "reference"))
        lines.append(f"  KID x 1000: {1000 * student:.2f}, the teachers' own {1000 * reference:.2f}; no FID (--quick)")
    if figures["score_error"]:
        lines.append(f"  score error: {figures['score_error']['mean']:.3f} (0: the teacher's scores; 1: the base's)")
    if figures["judged"]:
        both = figures["judged"]["both"]
        low, high = both["interval"]
        lines.append(
            f"  right style and thing: {both['mean_difference']:+.2f} points beside the teachers "
            f"(95 %: {low:+.2f} to {high:+.2f}), worst style {both['worst']:+.1f}"
        )
    return "\n".join(lines)


def _teacher(text: str) -> tuple[str, tuple[str, float | None]]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"'{text}' is no teacher; write NAME=PATH")
    scaled, scale = read_scaled_path(path)
    whole = Path(path).expanduser()
    return name, (path, None) if scaled == whole or whole.exists() else (str(scaled), scale)
