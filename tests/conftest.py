"""A tiny SD 1.x of real diffusers classes, in every form that models come in."""

import gc
import os
from pathlib import Path

import pytest
import torch
from adapter_helpers import some_adapter
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BitImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

import dmm.training.merge  # noqa: F401  with all that it imports, see below
from dmm.formats.single_file import save_single_file
from dmm.models.styles import Provenance, StylePrompts
from dmm.pipeline.styled import add_styles, save_pipeline

# tests run in several processes, and models as small as these gain nothing by threads
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# merges collect garbage often, and what was imported, a million objects, is none
gc.collect()
gc.freeze()

MAX_TOKENS = 24
STYLE_NAMES = ["ink", "photo", "clay"]
PROVENANCE = [Provenance(name, f"models/{name}.safetensors", "0" * 64, "sd1", "epsilon") for name in STYLE_NAMES]


def tiny_tokenizer() -> CLIPTokenizer:
    """One token for each byte, one for each byte that ends a word."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=MAX_TOKENS)


def tiny_text_encoder(tokenizer: CLIPTokenizer, hidden_size: int = 16, num_hidden_layers: int = 2) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tiny_unet(widths: tuple[int, ...] = (8, 16), **overrides) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * len(widths),
        "up_block_types": ("CrossAttnUpBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **overrides})


def tiny_vae(widths: tuple[int, ...] = (8, 8), **overrides) -> AutoencoderKL:
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**config, **overrides})


def tiny_pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_styled() -> StableDiffusionPipeline:
    """:func:`tiny_pipeline` with styles that differ far more than rounding does."""
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    prompts = StylePrompts(STYLE_NAMES, dim=32)
    torch.nn.init.normal_(prompts.linear_2.weight, std=2)
    add_styles(pipe, prompts)
    return pipe


def tiny_adapted() -> StableDiffusionPipeline:
    """:func:`tiny_pipeline` with styles that are adapters, and differ far more than rounding does."""
    pipe = tiny_pipeline()
    prompts = StylePrompts(STYLE_NAMES, dim=0)
    prompts.adapters = {name: some_adapter(pipe.unet, 1 + i, rank=2 + i) for i, name in enumerate(STYLE_NAMES)}
    add_styles(pipe, prompts)
    return pipe


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    """A tiny SD 1.x of one's own."""
    return tiny_pipeline()


@pytest.fixture
def styled() -> StableDiffusionPipeline:
    """A tiny merged model of one's own."""
    return tiny_styled()


@pytest.fixture
def adapted() -> StableDiffusionPipeline:
    """A tiny merged model of one's own whose styles are adapters."""
    return tiny_adapted()


@pytest.fixture(scope="session")
def merged(tmp_path_factory) -> Path:
    """The same on disk; read only, copy it to change it."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    save_pipeline(tiny_styled(), folder, provenance=PROVENANCE)
    return folder


@pytest.fixture(scope="session")
def merged_adapters(tmp_path_factory) -> Path:
    """:func:`tiny_adapted` on disk; read only, copy it to change it."""
    folder = tmp_path_factory.mktemp("merged") / "adapters"
    save_pipeline(tiny_adapted(), folder, provenance=PROVENANCE)
    return folder


@pytest.fixture(scope="session")
def sd1_folder(tmp_path_factory) -> Path:
    """A stock folder; read only, copy it to change it."""
    folder = tmp_path_factory.mktemp("sd1") / "folder"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd1_file(tmp_path_factory) -> Path:
    """The same model as a single file of the original layout; read only."""
    path = tmp_path_factory.mktemp("sd1") / "model.safetensors"
    save_single_file(tiny_pipeline(), path)
    return path


@pytest.fixture(scope="session")
def dino(tmp_path_factory) -> Path:
    """A tiny DINOv2, to compare pictures in."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
    Dinov2Model(config).save_pretrained(folder)
    crop = {"height": 16, "width": 16}
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size=crop).save_pretrained(folder)
    return folder
