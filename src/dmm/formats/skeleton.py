"""Models built from their configs without weights: what files are held against before they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmm.errors import UserError
from dmm.families import Component, Family
from dmm.files.json import read_json
from dmm.formats.building import building, check_config
from dmm.formats.detect import check_paints_from_noise


def build_skeletons(folder: Path, family: Family, *, only_names: bool = False) -> dict[str, Any]:
    """Build each component that has weights, on the meta device.

    Args:
        folder: a stock pipeline folder; only its configs are read.
        only_names: the parts need not paint together: an inpainting UNet, which reads more than latents, will do.
    Returns: models by the components' names.
    Raises: UserError: a config is missing, is not JSON, or describes no model of its class; or the parts do not fit.
    """
    skeletons = {
        component.name: build_skeleton(folder / component.name, component, family)
        for component in parts_of(folder, family)
    }
    _check_widths(skeletons, folder, family, only_names=only_names)
    return skeletons


def parts_of(folder: Path, family: Family) -> tuple[Component, ...]:
    """The components that a stock pipeline folder has to have, and the optional ones that it has."""
    return family.present({path.parent.name for path in folder.glob("*/config.json")})


def build_skeleton(at: Path, component: Component, family: Family) -> Any:
    """Build one component of the folder that holds its config, on the meta device.

    Raises: UserError: the config is missing, is not JSON, or describes no model of its class.
    """
    config_path = at / "config.json"
    config = read_json(config_path)
    found = config.get("_class_name", component.model_class.__name__)
    if found != component.model_class.__name__:
        raise UserError(
            f"{config_path} describes a {found}; {family.title} has a {component.model_class.__name__} there. "
            "Choose a model of that family."
        )
    check_config(config, config_path, component.model_class)
    with building(f"{config_path} describes no {component.model_class.__name__}"), torch.device("meta"):
        return from_config(component.model_class, at)


def check_tensors(model: Any, found: Mapping[str, Tensor], where: str, names: Mapping[str, str] | None = None) -> None:
    """Hold a file's tensors against the model that they are meant for.

    Args:
        model: from ``build_skeletons``.
        found: by the model's own names.
        where: the file, as the error's first words.
        names: what the file calls each of the model's tensors, where it has names of its own.
    Raises: UserError: tensors are missing, are left over, or have another shape.
    """
    expected = model.state_dict()
    shown = dict(names) if names else {name: name for name in expected}
    kind = type(model).__name__
    # what is one tensor under two names is saved under either
    twins = getattr(model, "all_tied_weights_keys", None) or {}
    twins = {**twins, **{other: name for name, other in twins.items()}}
    missing = [name for name in expected if name not in found and twins.get(name) not in found]
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} of the {len(expected)} tensors of its {kind}, the first of them "
            f"'{shown[missing[0]]}'. The file is incomplete, or its config describes another model."
        )
    check_nothing_left([name for name in found if name not in expected], f"its {kind}", where)
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{where}: '{shown[name]}' has shape {tuple(tensor.shape)}, the config's {kind} "
                f"{tuple(expected[name].shape)}. Pass the config of a model of the same architecture."
            )


def check_nothing_left(names: list[str], known: str, where: str) -> None:
    """Refuse tensors that nothing would use: they belong to another model, or to a part that would be lost.

    Raises: UserError: naming the first of them.
    """
    if names:
        raise UserError(
            f"{where} holds tensors that {known} has no use for: {len(names)}, the first of them '{names[0]}'. "
            "The file belongs to another kind of model; nothing of it is dropped quietly."
        )


def from_config(model_class: Any, folder: Path) -> Any:
    """A model of a class, as its folder's config describes it; without its weights."""
    if issubclass(model_class, PreTrainedModel):
        return model_class(model_class.config_class.from_pretrained(folder))
    return model_class.from_config(model_class.load_config(folder))


def _check_widths(skeletons: Mapping[str, Any], folder: Path, family: Family, *, only_names: bool) -> None:
    name = family.denoiser.name
    size = family.sample_size_of(skeletons[name].config)
    if not (isinstance(size, int) or (isinstance(size, list | tuple) and len(size) == 2)):
        raise UserError(f"{folder / name / 'config.json'}: its sample_size is {size}; a number, or two, was expected.")
    configs = {part: skeleton.config for part, skeleton in skeletons.items()}
    widths = family.widths(configs)
    if only_names:
        widths = [one for one in widths if "in_channels" not in one[0]]
    else:
        check_paints_from_noise(str(folder), configs[name].in_channels, configs["vae"].latent_channels)
    for what, found, expected in widths:
        if found != expected:
            raise UserError(
                f"{folder}: the {family.denoiser.title} {what} {found}, the folder's other parts give {expected}. "
                "Choose a text-to-image model whose parts belong together."
            )
