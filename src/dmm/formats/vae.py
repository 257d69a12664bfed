"""VAEs on their own, which stand in for the one that a model came with."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download

from dmm.errors import UserError
from dmm.families import Component, Family
from dmm.formats.building import building
from dmm.formats.folder import check_component, open_scaled
from dmm.formats.single_file import check_vae_file
from dmm.formats.skeleton import build_skeleton
from dmm.formats.tensors import read_header

_COMPONENT = Component("vae", AutoencoderKL, original_prefix="", weights_name="diffusion_pytorch_model")


def check_vae(path: Path, skeletons: dict[str, Any], family: Family, *, allow_pickle: bool) -> None:
    """Check everything about a VAE that can be known without loading its weights.

    Args:
        path: a folder with a VAE's config and weights, a pipeline folder that has such a folder ``vae``, or a single
            file of the original layout, whose config is that of the model.
        skeletons: of the model that it is for.
    Raises: UserError: no VAE, not wholly there, or not one for this model.
    """
    if path.is_dir():
        (component,) = (one for one in family.components if one.name == "vae")
        at = vae_folder(path)
        vae = build_skeleton(at, component, family)
        check_component(at, component, vae, allow_pickle=allow_pickle)
        for what, found, expected in zip(
            ("latent channels", "levels"), _measures(vae), _measures(skeletons["vae"]), strict=True
        ):
            if found != expected:
                raise UserError(
                    f"{path}: the VAE has {found} {what}, the model's own {expected}. Choose a VAE of the same family."
                )
    else:
        check_vae_file(path, read_header(path, allow_pickle=allow_pickle), skeletons, family)


def open_vae(path: Path, *, config: Path, torch_dtype: torch.dtype, allow_pickle: bool) -> AutoencoderKL:
    """Load a VAE that :func:`check_vae` has passed.

    Args:
        config: the pipeline folder whose VAE's config a single file follows.
    """
    if path.is_dir():
        at = vae_folder(path)
        scaled = open_scaled(at, _COMPONENT, torch_dtype=torch_dtype, allow_pickle=allow_pickle)
        if scaled is not None:
            assert isinstance(scaled, AutoencoderKL)
            return scaled
        with building(f"{path} holds no VAE that can be opened"):
            return AutoencoderKL.from_pretrained(
                at,
                torch_dtype=torch_dtype,
                use_safetensors=None if allow_pickle else True,
                local_files_only=True,
            )
    with building(f"{path} is no VAE that can be opened"):
        return AutoencoderKL.from_single_file(
            str(path), config=str(config), subfolder="vae", torch_dtype=torch_dtype, local_files_only=True
        )


def fetch_vae(hub_id: str) -> Path:
    """The local folder of a VAE on the hub: a repository of its own, or a pipeline's.

    Raises: OSError, ValueError: the hub did not give it.
    """
    patterns = ["config.json", "*.safetensors"]
    return Path(snapshot_download(hub_id, allow_patterns=[*patterns, *(f"vae/{pattern}" for pattern in patterns)]))


def vae_folder(path: Path) -> Path:
    """Where a VAE's config and weights are: ``vae`` in a pipeline folder, or the folder itself."""
    return path / "vae" if (path / "vae").is_dir() else path


def _measures(vae: Any) -> tuple[int, int]:
    return vae.config.latent_channels, len(vae.config.block_out_channels)
