"""Fine-tune the base into an expert of one hand: every weight, or a LoRA; epsilon, or v-prediction.

``python train_expert.py --style twemoji ...`` leaves ``experts/twemoji/``, a stock pipeline folder, or,
with ``--lora-rank``, ``experts/twemoji.safetensors``, a LoRA for the base in kohya's layout. With ``--family sdxl``
both are of the small SDXL, in ``sdxl-experts/``.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from denoising import encode_views
from dmm.families import family_of
from dmm.formats.lora import save_kohya_lora
from drawings import STYLES, read_drawings
from fine_tuning import fine_tune

LORA_TARGETS = (  # what kohya's LoCon adapts: all of the transformer blocks and residual blocks
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where train_base.py left base/")
    parser.add_argument("--style", choices=STYLES, required=True)
    parser.add_argument("--family", choices=("sd1", "sdxl"), default="sd1")
    parser.add_argument("--name", help="by default the style's")
    parser.add_argument("--train-text-encoder", action="store_true")
    parser.add_argument("--lora-rank", type=int, help="train a LoRA of this rank instead of all weights")
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--zero-terminal-snr", action="store_true", help="on a schedule that ends in pure noise")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    name = args.name or args.style

    prefix = "sdxl-" if args.family == "sdxl" else ""
    pipeline = DiffusionPipeline.from_pretrained(args.work / f"{prefix}base", dtype=torch.float32)
    drawings = read_drawings(args.drawings)
    own = drawings.select((drawings.concepts >= 0) & (drawings.styles == STYLES.index(args.style)))
    latents = encode_views(pipeline.vae, own)
    torch.manual_seed(0)
    for text_encoder in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if text_encoder is not None:
            text_encoder.requires_grad_(args.train_text_encoder)
    if args.lora_rank:
        pipeline.unet.requires_grad_(False)
        pipeline.unet.add_adapter(
            LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=list(LORA_TARGETS))
        )
    fine_tune(
        pipeline,
        latents,
        own.texts,
        args.work / f"{prefix}{name}-run",
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        prediction_type=args.prediction_type,
        zero_terminal_snr=args.zero_terminal_snr,
    )
    experts = args.work / f"{prefix}experts"
    experts.mkdir(exist_ok=True)
    if args.lora_rank:
        save_kohya_lora(experts / f"{name}.safetensors", {"unet": pipeline.unet}, family_of(pipeline))
    else:
        told = {"prediction_type": args.prediction_type}
        if args.zero_terminal_snr:  # such a model is sampled from its very last step
            told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipeline.scheduler.register_to_config(**told)
        pipeline.save_pretrained(experts / name)


if __name__ == "__main__":
    main()
