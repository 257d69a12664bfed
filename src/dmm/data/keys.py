"""What names cached content: digests of all that it was made from."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmm.families import text_encoders_of
from dmm.models.styles import styled_port

_VERSION = 1  # raise it when our own way of making cached content changes
_VAE_CONFIG = ("act_fn", "norm_num_groups", "scaling_factor", "shift_factor")
_CLIP_CONFIG = ("hidden_act", "layer_norm_eps", "num_attention_heads")
_NO_SETTINGS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def key_of(**parts: Any) -> str:
    """A file name's worth of digest of JSON values by name, their order aside."""
    text = json.dumps({"version": _VERSION, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of tensors' names, dtypes, shapes and bytes, their order aside."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_vae(vae: Any) -> str:
    """Identity of a VAE: equal for two whose latents mean the same, whatever else their configs say."""
    return _digest_module(vae, {name: vae.config.get(name) for name in _VAE_CONFIG})


def digest_text_encoders(pipeline: Any) -> list[str]:
    """Identity of a pipeline's text encoders, in order; tokenizers are told by the tokens that they make."""
    return [_digest_module(encoder, _settings(encoder.config)) for encoder in text_encoders_of(pipeline)]


def _settings(config: Any) -> dict[str, Any]:
    """What a text encoder computes by, beside its weights."""
    if all(hasattr(config, name) for name in _CLIP_CONFIG):
        return {name: getattr(config, name) for name in _CLIP_CONFIG}
    return {name: value for name, value in config.to_dict().items() if name not in _NO_SETTINGS}


def digest_denoiser(denoiser: Any) -> str:
    """Identity of a denoiser and of the style that is set on it."""
    styled = styled_port(denoiser)
    term = None if styled is None or styled.term is None else digest_tensors({"term": styled.term})
    return _digest_module(denoiser, {"config": public_config(denoiser), "style": term})


def public_config(model: Any) -> dict[str, Any]:
    """A diffusers config without what only tells where it came from and what wrote it."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def _digest_module(module: Any, settings: Mapping[str, Any]) -> str:
    return key_of(tensors=digest_tensors(module.state_dict()), settings=settings)
