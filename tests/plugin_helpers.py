"""Tiny plugins of diffusers' real classes, for the tiny Stable Diffusion of conftest."""

from pathlib import Path

import torch
from conftest import tiny_unet
from diffusers import ControlNetModel, T2IAdapter
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

CLIP_WIDTH = 12


def randomize(model, seed: int, std: float = 0.3):
    """Weights of which none is zero, as those of a fresh ControlNet or LoRA are."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny_controlnet(seed: int = 5) -> ControlNetModel:
    torch.manual_seed(seed)
    # as many levels as the VAE shrinks by, so that pixels become latents
    net = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(4, 8))
    return randomize(net, seed, std=0.1)


def tiny_t2i_adapter(seed: int = 6) -> T2IAdapter:
    torch.manual_seed(seed)
    # the tiny VAE shrinks by two, and so does the adapter
    return randomize(
        T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"),
        seed,
        std=0.1,
    )


def save_lora(path: Path, seed: int = 7, text_encoder=None) -> Path:
    """A LoRA for the tiny UNet, as diffusers' trainers write it."""
    torch.manual_seed(seed)
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        path.parent, unet_lora_layers=layers, text_encoder_lora_layers=text_encoder, weight_name=path.name
    )
    return path


def save_ip_adapter(folder: Path, seed: int = 8, cross_attention_dim: int = 16, unet=None) -> Path:
    """An IP-Adapter's file in the layout of its authors, and the CLIP image encoder that it reads beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=112,
        projection_dim=CLIP_WIDTH,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    num_tokens = 4
    tensors = {
        "image_proj.proj.weight": torch.randn(num_tokens * cross_attention_dim, CLIP_WIDTH),
        "image_proj.proj.bias": torch.zeros(num_tokens * cross_attention_dim),
        "image_proj.norm.weight": torch.ones(cross_attention_dim),
        "image_proj.norm.bias": torch.zeros(cross_attention_dim),
    }
    unet = unet or tiny_unet()
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(layers):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * i + 1}.{part}.weight"] = torch.randn(width, cross_attention_dim)
    save_file(tensors, folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"
