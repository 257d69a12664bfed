"""A tiny random pipeline of every family."""

import pytest
import torch
from conftest import MAX_TOKENS, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dmm.families import FAMILIES
from dmm.formats.single_file import save_single_file


def tiny_sd2(seed: int = 0, prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    pipe = tiny_pipeline(seed, prediction_type)
    torch.manual_seed(seed)
    pipe.register_modules(unet=tiny_unet(use_linear_projection=True))
    return pipe


def tiny_sdxl(seed: int = 0, prediction_type: str = "epsilon", **schedule) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
        **schedule,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(force_upcast=True),
        text_encoder=tiny_text_encoder(tokenizer, num_hidden_layers=3),
        text_encoder_2=_with_projection(tokenizer, hidden_size=24, projection_dim=12),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet(
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=12 + 6 * 8,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
        ),
        scheduler=scheduler,
    )


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16 + 24,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 12,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(latent_channels=16, shift_factor=0.0609),
        text_encoder=_with_projection(tokenizer, hidden_size=16, projection_dim=16),
        tokenizer=tokenizer,
        text_encoder_2=_with_projection(tokenizer, hidden_size=24, projection_dim=12),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def tiny_flux(seed: int = 0, *, guidance: bool = True) -> FluxPipeline:
    torch.manual_seed(seed)
    tokenizer, pieces = tiny_tokenizer(), tiny_pieces()
    t5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.1159),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(pieces), dropout_rate=0, **t5)),
        tokenizer_2=pieces,
    )


def tiny_pieces() -> T5Tokenizer:
    """A token for each of some letters."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=512)


def tiny_z_image(seed: int = 0) -> ZImagePipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_chat()
    qwen = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 1024}
    text = Qwen3Config(vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, **qwen)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    for parameter in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(parameter)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1159),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
    )


def tiny_chat() -> Qwen2Tokenizer:
    """A token for each byte, and those that a chat is written with."""
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    names = [*sorted(ByteLevel.alphabet()), *marks]
    tokenizer = Qwen2Tokenizer({name: i for i, name in enumerate(names)}, [], model_max_length=131072)
    tokenizer.chat_template = (
        "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _with_projection(tokenizer, hidden_size, projection_dim):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection_dim,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


TINY = {
    "sd1": tiny_pipeline,
    "sd2": tiny_sd2,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "z_image": tiny_z_image,
}
"""By the families' names, called with a seed."""
UNETS = [name for name in TINY if FAMILIES[name].denoiser.layout]
"""Those whose models are kept in single files, too."""


@pytest.fixture(scope="session", params=[name for name in UNETS if name != "sd1"])
def later_on_disk(request, tmp_path_factory):
    """A family but the first, and a model of it as a folder and as a single file; read only."""
    at = tmp_path_factory.mktemp(request.param)
    pipe = TINY[request.param]()
    pipe.save_pretrained(at / "folder")
    save_single_file(pipe, at / "model.safetensors")
    return FAMILIES[request.param], at / "folder", at / "model.safetensors"
