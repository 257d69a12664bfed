"""The options that tell how to open a model, and opening it as they tell."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmm.cli.arguments import add_device, read_scaled_path
from dmm.cli.hardware import check_device, count_devices
from dmm.errors import UserError
from dmm.files.runs import check_finished, find_run
from dmm.files.weights import check_model_file

if TYPE_CHECKING:
    import torch

    from dmm.models.styles import StylePrompts
    from dmm.models.teachers import ModelSource

NOTHING_TO_FREE = "--offload frees the memory of a GPU, and there is none in use here; leave it out."


def add_opening_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    opening = parser.add_argument_group("how to open the model")
    opening.add_argument(
        "--config",
        metavar="FOLDER",
        type=Path,
        help="the pipeline folder that a single file follows (default: what it says, or its family's, from the hub)",
    )
    opening.add_argument(
        "--from-checkpoint",
        action="store_true",
        help="paint with the newest checkpoint of a merge that is under way, whose folder is MODEL",
    )
    opening.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        dest="loras",
        type=read_scaled_path,
        action="append",
        default=[],
        help="put a LoRA on the model; may be given several times (scale: 1)",
    )
    opening.add_argument(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what a single file predicts, where it does not say (default: what the model says)",
    )
    opening.add_argument(
        "--ema", action="store_true", help="of a single file, the running average of its weights (model_ema.) instead"
    )
    opening.add_argument("--allow-pickle", action="store_true", help="open .ckpt and .bin files too")
    add_device(opening)
    opening.add_argument(
        "--offload",
        choices=("model", "sequential"),
        help="keep in a GPU's memory only what computes: a model at a time, or, far slower, a layer at a time",
    )
    opening.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), help="of the weights (default: fp16 on a GPU, fp32 on a CPU)"
    )


def check_opening(args: argparse.Namespace) -> None:
    """Refuse files that are not there, before anything heavy is imported.

    Raises: UserError.
    """
    if args.from_checkpoint:
        _check_run(args)
    else:
        check_there(args.model, allow_pickle=args.allow_pickle)
    check_device(args.device)
    if args.offload and (
        args.device == "cpu" or (not args.device and count_devices("cuda") == count_devices("mps") == 0)
    ):
        raise UserError(NOTHING_TO_FREE)
    if args.config is not None and not args.config.is_dir():
        raise UserError(f"--config {args.config}: no such folder. Name a stock pipeline folder.")
    for lora, _ in args.loras:
        if not lora.exists():
            raise UserError(f"--lora {lora}: no such file. Check the path.")


def check_there(model: str, *, allow_pickle: bool = True) -> None:
    """Refuse a model that :func:`check_path` refuses, and a file that is no full model's.

    Args:
        allow_pickle: whether a pickle may be one; by default that is settled where it is opened.
    Raises: UserError.
    """
    check_path(model)
    path = Path(model).expanduser()
    if path.is_file():
        check_model_file(path, allow_pickle=allow_pickle)


def check_path(model: str) -> None:
    """Refuse a model or LoRA that is neither here nor might be on the hub, and a merge that has not ended.

    Raises: UserError.
    """
    path = Path(model).expanduser()
    might_be_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and not path.parent.exists()
    if not path.exists() and not might_be_hub_id:
        raise UserError(f"{model}: no such file or folder. Check the path.")
    check_finished(path)


def _check_run(args: argparse.Namespace) -> None:
    if find_run(Path(args.model).expanduser()) is None:
        raise UserError(f"--from-checkpoint: {args.model} is not the folder of a merge; leave it out.")
    if args.config is not None or args.loras or args.prediction_type is not None:
        raise UserError("--from-checkpoint opens a merge as it is: leave out --config, --lora and --prediction-type.")


def read_source(args: argparse.Namespace) -> "ModelSource":
    """What the options tell of the model's files."""
    from dmm.models.teachers import ModelSource

    return ModelSource(
        args.model,
        config=args.config,
        loras=tuple(args.loras),
        prediction_type=args.prediction_type,
        ema=args.ema,
        allow_pickle=args.allow_pickle,
    )


def open_model(args: argparse.Namespace, source: "ModelSource", style_prompts: "StylePrompts | None") -> Any:
    """Open a model in the dtype that the options tell; :func:`place_model` puts it where it runs.

    Args:
        style_prompts: of a merged model; None of a stock one.
    Raises: UserError: there is no such device, or something is wrong with the files.
    """
    from dmm.models.teachers import open_pipeline
    from dmm.pipeline.styled import open_styled

    dtype = find_dtype(args)
    if style_prompts is None:
        return open_pipeline(source, torch_dtype=dtype)
    return open_styled(source, style_prompts, torch_dtype=dtype)


def find_dtype(args: argparse.Namespace) -> "torch.dtype":
    """Of the weights, as the options tell.

    Raises: UserError: there is no such device.
    """
    import torch

    from dmm.models.devices import find_device

    device = find_device(args.device)
    if args.offload and device.type == "cpu":
        raise UserError(NOTHING_TO_FREE)
    precision = args.precision or ("fp32" if device.type == "cpu" else "fp16")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def place_model(args: argparse.Namespace, pipeline: Any) -> None:
    """Put a pipeline, with all that was added to it, on the device that the options tell, or offload it."""
    from dmm.models.devices import find_device

    device = find_device(args.device)
    match args.offload:
        case "model":
            pipeline.enable_model_cpu_offload(device=device)
        case "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        case _:
            pipeline.to(device)
