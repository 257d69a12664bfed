"""Train the base: tokenizer, text encoder and UNet, on all eight hands at once.

The captions hold no word of style, so that the base is, like SD 1.5, a blur of them all. ``--family sdxl`` trains a
small SDXL instead, ``sdxl-base/`` for ``base/``.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import xl
from denoising import SCHEDULE, TEMPLATES, Denoiser, denoising_loss, encode_views
from drawings import SIZE, read_drawings
from training import fit

MAX_TOKENS = 24
MERGES = 900


def new_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from ``texts``."""
    blank = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    symbols = alphabet + [symbol + "</w>" for symbol in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + MERGES, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator((template.format(text) for text in texts for template in TEMPLATES), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens
    ordered = dict.fromkeys([*symbols, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer({token: i for i, token in enumerate(ordered)}, merges, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet(latent_channels: int) -> UNet2DConditionModel:
    """Two levels, 8 x 8 and 4 x 4, with cross-attention at both and in between."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 80),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads: diffusers keeps SD 1.5's name for it
        norm_num_groups=16,
    )


def new_pipeline(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The stock pipeline of what was trained."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where train_vae.py left vae/")
    parser.add_argument("--family", choices=("sd1", "sdxl"), default="sd1")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    args = parser.parse_args()

    drawings = read_drawings(args.drawings)
    published = drawings.select(drawings.concepts >= 0)
    vae = AutoencoderKL.from_pretrained(args.work / "vae")
    latents = encode_views(vae, published.images)
    # eight times each: a published concept's name should be whole words
    tokenizer = new_tokenizer(sorted(set(drawings.texts)) + 8 * sorted(set(published.texts)))
    torch.manual_seed(0)
    channels = vae.config.latent_channels
    is_xl = args.family == "sdxl"
    model = (
        xl.DenoiserXL(xl.new_unet(channels), *xl.new_text_encoders(tokenizer))
        if is_xl
        else Denoiser(new_unet(channels), new_text_encoder(tokenizer))
    )
    scheduler = DDPMScheduler(**SCHEDULE)

    def step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(published), (args.batch_size,), generator=generator)
        views = torch.randint(latents.shape[1], (args.batch_size,), generator=generator)
        texts = [published.texts[i] for i in rows.tolist()]
        return denoising_loss(model, tokenizer, scheduler, latents[rows, views], texts, generator), {}

    name = "sdxl-base" if is_xl else "base"
    fit(model, step, args.work / f"{name}-run", steps=args.steps, learning_rate=args.learning_rate)
    if isinstance(model, xl.DenoiserXL):
        pipeline = xl.new_pipeline(model, vae, tokenizer)
    else:
        pipeline = new_pipeline(model, vae, tokenizer)
    pipeline.save_pretrained(args.work / name)


if __name__ == "__main__":
    main()
