"""Whether a weight file is the kind of file that it is passed as."""

from collections.abc import Iterable
from pathlib import Path

from dmm.errors import UserError
from dmm.families import FAMILIES, Family, Stranger, family_of_names, known_titles
from dmm.files.weights import check_no_lora
from dmm.formats.tensors import Header

_READS = "model.diffusion_model.input_blocks.0.0.weight"
_LATENTS = "first_stage_model.post_quant_conv.weight"
_DIFFUSERS_PARTS = ("down_blocks.", "mid_block.", "encoder.layers.")


def family_of_file(path: Path, header: Header, expected: Family | None = None) -> Family:
    """The family of a single file that holds a full checkpoint.

    Args:
        expected: which it must be of; by default any.
    Raises: UserError: a LoRA, of another family, one part of a model, or nothing that we know.
    """
    names = header.tensors
    check_no_lora(path, names)
    title = expected.title if expected else known_titles()
    told = family_of_names(names)
    if told is None and any(part in name for name in names for part in _DIFFUSERS_PARTS):
        raise UserError(
            f"{path} is one part of a diffusers model (it holds '{next(iter(names))}'). Pass the folder that "
            "holds its model_index.json."
        )
    if told is None:
        example = (expected or next(iter(FAMILIES.values()))).denoiser.original_prefix
        raise UserError(
            f"{path}: none of its {len(names)} tensors has a name that we know{_example(names)}. "
            f"{title} was expected, with names such as '{example}...'."
        )
    family, name = told
    if isinstance(family, Stranger) or family is not (expected or family):
        raise UserError(
            f"{path} is {family.title} (it holds '{name}'); {title} was expected. Choose models of one family."
        )
    return family


def check_is_checkpoint(path: Path, header: Header, family: Family) -> None:
    """Check that a single file is a full checkpoint of ``family``.

    Raises: UserError: as :func:`family_of_file`; or a part is missing.
    """
    family_of_file(path, header, family)
    if family.denoiser.layout is None:
        raise UserError(
            f"{path} is a single file of {family.title}, which opens as a folder only. Convert it once with diffusers "
            f"({family.pipeline_class.__name__}.from_single_file(...).save_pretrained(...)) and pass that folder; dmm "
            "soup takes such files as they are."
        )
    names = header.tensors
    for component in family.components:
        if not any(name.startswith(component.original_prefix) for name in names):
            raise UserError(
                f"{path} has no {component.name}: none of its {len(names)} tensors is named "
                f"'{component.original_prefix}...'. Pass a full checkpoint."
            )
    reads, latents = names.get(_READS), names.get(_LATENTS)
    if reads is not None and latents is not None and reads.ndim == latents.ndim == 4:
        check_paints_from_noise(str(path), reads.shape[1], latents.shape[1])


def check_paints_from_noise(where: str, num_channels: int, num_latents: int) -> None:
    """Refuse an inpainting model of its own kind, which reads a mask and a picture beside its latents.

    Args:
        where: the model, as the error's first words.
        num_channels: that its UNet reads.
        num_latents: channels of the latents.
    Raises: UserError: with what such models are for, and what does it with others.
    """
    if num_channels == 2 * num_latents + 1:
        raise UserError(
            f"{where} is an inpainting model: its UNet reads {num_channels} channels, the latents, a mask and the "
            "masked picture. To inpaint, paint with a text-to-image model and a mask (dmm generate --image --mask); to "
            "average inpainting models with each other, use dmm soup; for all else choose the text-to-image model that "
            "it was made of."
        )


def _example(names: Iterable[str]) -> str:
    first = next(iter(names), None)
    return f" (such as '{first}')" if first else ""
