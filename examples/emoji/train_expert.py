"""Fine-tune the base into an expert of one hand: every weight, or a LoRA; epsilon, or v-prediction.

``python train_expert.py --drawings FOLDER --style NAME`` takes a captioned folder of anybody's pictures, of any size,
and leaves ``FOLDER-work/experts/NAME/``, a stock pipeline folder, or, with ``--lora-rank``, ``NAME.safetensors``, a
LoRA in kohya's layout for the embedded base, which is put beside them as ``FOLDER-work/base/``.

Where FOLDER holds the eight hands' folders, NAME is one of them. With ``--family sdxl`` base and experts are the small
SDXL's, in ``sdxl-base/`` and ``sdxl-experts/``. Started again, it goes on where it stopped.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

from denoising import encode_views
from dmm.demo import experts
from dmm.errors import UserError
from dmm.families import family_of
from dmm.files.outputs import new_folder
from dmm.formats.lora import save_kohya_lora
from dmm.models.libraries import quiet_libraries
from drawings import STYLES, holds_hands, read_drawings, read_hand
from fine_tuning import fine_tune

LORA_TARGETS = (  # what kohya's LoCon adapts: all of the transformer blocks and residual blocks
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--drawings", type=Path, required=True, help="a hand's captioned folder, or one of the eight hands' folders"
    )
    parser.add_argument("--work", type=Path, help="where all is kept (default: FOLDER-work, beside the drawings)")
    parser.add_argument("--style", required=True, help="the hand's name")
    parser.add_argument("--family", choices=("sd1", "sdxl"), default="sd1")
    parser.add_argument("--name", help="of the expert (default: the style's)")
    parser.add_argument("--train-text-encoder", action="store_true")
    parser.add_argument("--lora-rank", type=int, help="train a LoRA of this rank instead of all weights")
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--zero-terminal-snr", action="store_true", help="on a schedule that ends in pure noise")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    if args.lora_rank and args.train_text_encoder:
        parser.error("--train-text-encoder: a LoRA here is of the UNet alone; leave one of the two out")
    quiet_libraries()
    try:
        print(f"Wrote {train(args)}")
    except UserError as error:
        parser.error(str(error))


def train(args: argparse.Namespace) -> Path:
    """Train what the arguments say; returns the expert's folder, or its LoRA's file."""
    name = args.name or args.style
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"'{name}' cannot be a file's name; give a plain one, such as --name ink.")
    images, texts = read_own(args.drawings, args.style)
    folder = args.drawings.expanduser().resolve()
    work = args.work or folder.with_name(f"{folder.name}-work")
    prefix = "sdxl-" if args.family == "sdxl" else ""
    run = work / f"{prefix}{name}-run"
    digest = hashlib.sha256(images.numpy().tobytes() + repr(texts).encode()).hexdigest()
    told = {key: value for key, value in vars(args).items() if key not in ("drawings", "work", "style", "name")}
    keep_settings(run, {"style": args.style, **told, "drawings": digest})

    pipeline = DiffusionPipeline.from_pretrained(base_in(work, args.family, prefix), dtype=torch.float32)
    for text_encoder in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if text_encoder is not None:
            text_encoder.requires_grad_(args.train_text_encoder)
    latents = encode_views(pipeline.vae, images)
    torch.manual_seed(0)
    if args.lora_rank:
        pipeline.unet.requires_grad_(False)
        pipeline.unet.add_adapter(
            LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=list(LORA_TARGETS))
        )
    fine_tune(
        pipeline,
        latents,
        texts,
        run,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        prediction_type=args.prediction_type,
        zero_terminal_snr=args.zero_terminal_snr,
    )
    made: Path = work / f"{prefix}experts"
    made.mkdir(exist_ok=True)
    if args.lora_rank:
        file = made / f"{name}.safetensors"
        save_kohya_lora(file, {"unet": pipeline.unet}, family_of(pipeline))
        return file
    schedule = {"prediction_type": args.prediction_type}
    if args.zero_terminal_snr:  # such a model is sampled from its very last step
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler.register_to_config(**schedule)
    pipeline.save_pretrained(made / name)
    return made / name


def read_own(folder: Path, style: str) -> tuple[Tensor, list[str]]:
    """One hand's pictures, (N, 3, 64, 64) uint8, and captions; of the eight hands', the published concepts alone.

    Raises: UserError: the folder holds hands, and none of that name; or see :func:`drawings.read_hand`.
    """
    if not holds_hands(folder):
        return read_hand(folder)
    if style not in STYLES:
        raise UserError(f"'{folder}' holds several hands' folders, and none of '{style}'; name {', '.join(STYLES)}.")
    drawings = read_drawings(folder)
    own = drawings.select((drawings.concepts >= 0) & (drawings.styles == STYLES.index(style)))
    return own.images, own.texts


def base_in(work: Path, family: str, prefix: str) -> Path:
    """The base that train_base.py left in the work folder, or else the embedded one, put there."""
    base = work / f"{prefix}base"
    if not base.is_dir():
        with new_folder(base) as temporary:
            shutil.copytree(experts(family)["base"], temporary, dirs_exist_ok=True)
    return base


def keep_settings(run: Path, settings: dict[str, object]) -> None:
    """Note what a run is of, so that it does not go on as another.

    Raises: UserError: it was begun with other settings.
    """
    file = run / "settings.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [key for key, value in settings.items() if before.get(key) != value]
        if other:
            raise UserError(
                f"'{run}' holds a run that was begun with another {', '.join(other)}. Give this one another --name, or "
                "remove that folder."
            )
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
