"""Stock diffusers pipeline folders."""

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dmm.errors import UserError
from dmm.families import FAMILIES, Component, Family, Stranger, family_of_class, known_titles
from dmm.files.few_steps import FILE as FEW_STEPS
from dmm.files.json import read_json
from dmm.formats.building import building, check_tokenizer
from dmm.formats.lora.reading import LORA_FILE
from dmm.formats.schedules import read_scheduler_config
from dmm.formats.skeleton import build_skeletons, check_tensors, from_config, parts_of
from dmm.formats.stock_files import INDEX, check_classes, config_files, read_index, shards
from dmm.formats.tensors import check_finite, read_header, read_tensors

UNUSED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a stock pipeline that are neither fetched nor loaded: nothing of ours calls them."""
VARIANT = "fp16"
"""The one variant that is looked for where a folder has no plain weights."""

# text encoders carry these along; nothing computes with them
_HARMLESS = ("embeddings.position_ids", "logit_scale", "text_projection.weight")


def known_parts() -> list[str]:
    """What of a folder is of one model, of whatever family, and goes with it when another takes its place."""
    named = [name for family in FAMILIES.values() for name in (*_names_of(family), *family.tokenizers)]
    return [INDEX, "model.safetensors", "styles", "scheduler", *dict.fromkeys(named), FEW_STEPS, *UNUSED_COMPONENTS]


def _names_of(family: Family) -> list[str]:
    components = family.components if family.controlnet is None else (*family.components, family.controlnet)
    return [one.name for one in components]


def check_configs(folder: Path, family: Family, *, only_names: bool = False) -> dict[str, Any]:
    """Check that a folder is a stock pipeline of a family, by its JSON files alone.

    Args:
        only_names: see :func:`build_skeletons`.
    Returns: its components' skeletons (see ``build_skeletons``).
    Raises: UserError: no pipeline folder, of another family, or a config that is missing or broken.
    """
    index = _read_index(folder)
    found = tell_folder(folder)
    if found is not family:
        raise _other_family(folder, found, family.title)
    check_classes(index, folder / INDEX, family)
    read_scheduler_config(folder, family)
    skeletons = build_skeletons(folder, family, only_names=only_names)
    for reader in family.present(skeletons):
        if reader.tokenizer:
            check_tokenizer(folder / reader.tokenizer, skeletons[reader.name].config, reader.num_tokens)
    return skeletons


def family_of_folder(folder: Path) -> Family:
    """The family of a stock folder, by its JSON files alone.

    Raises: UserError: no pipeline folder, or of no family that opens.
    """
    found = tell_folder(folder)
    if isinstance(found, Stranger):
        raise _other_family(folder, found, known_titles())
    return found


def tell_folder(folder: Path) -> Family | Stranger:
    """What a stock folder holds, whether it opens or not.

    Raises: UserError: no pipeline folder, or a config that is broken.
    """
    index = _read_index(folder)
    parts = [name for name, part in index.items() if isinstance(part, list) and part[0] is not None]
    # only those that lie there are looked into: an index may name anything, a path elsewhere or one of no bounds
    files = {path.parent.name: path for path in folder.glob("*/config.json")}
    configs = {name: read_json(files[name]) if name in files else {} for name in parts}
    kind = str(index.get("_class_name"))
    found = family_of_class(kind, configs)
    for family in FAMILIES.values():
        name = family.denoiser.name
        if isinstance(found, Stranger) and found.title == kind and kind in family.class_names and name in parts:
            config = read_json(files.get(name, folder / name / "config.json"))
            owner = next((one.title for one in FAMILIES.values() if one.denoiser.name == name and one.owns(config)), "")
            raise UserError(
                f"{folder}: its model_index.json names a {kind}, which is {family.title}'s, but {name}/config.json "
                f"describes {f'that of {owner}' if owner else 'another model'}. Its parts do not belong together; get "
                "another copy."
            )
    return found


def _other_family(folder: Path, found: Family | Stranger, expected: str) -> UserError:
    class_name = _read_index(folder).get("_class_name")
    return UserError(
        f"{folder} is {found.title} (model_index.json: {class_name}); {expected} was expected. "
        "Choose models of one family."
    )


def _read_index(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Pass a stock diffusers pipeline folder.")
    if (folder / LORA_FILE).is_file():
        raise UserError(f"{folder} holds a LoRA, not a full model. Pass it as the LoRA (lora=, --lora) with its base.")
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} holds no model_index.json, so it is no stock diffusers pipeline folder. Pass the folder that "
            "`save_pretrained` of a pipeline wrote, or a single .safetensors file."
        )
    return read_index(folder)


def check_folder(folder: Path, family: Family, *, allow_pickle: bool) -> dict[str, Any]:
    """Check everything about a stock folder that can be known without loading its weights.

    Returns: its components' skeletons.
    Raises: UserError: as ``check_configs``; weights missing, cut short, pickled, or not those of the configs.
    """
    skeletons = check_configs(folder, family)
    for component in family.present(skeletons):
        check_component(folder / component.name, component, skeletons[component.name], allow_pickle=allow_pickle)
    return skeletons


def check_component(at: Path, component: Component, model: Any, *, allow_pickle: bool) -> None:
    """Check that a component's folder holds all the weights of its skeleton, and no others.

    Raises: UserError: weights missing, cut short, pickled, or not those of the config.
    """
    tensors: dict[str, Tensor] = {}
    files, _ = weight_files(at, component, allow_pickle)
    for file in files:
        tensors.update(read_header(file, allow_pickle=allow_pickle).tensors)
    check_tensors(model, _current_names(model, tensors), str(at))


def open_scaled(at: Path, component: Component, *, torch_dtype: torch.dtype, allow_pickle: bool) -> Any | None:
    """Load a component that is in scaled fp8, which its library would read without the scales; None of any other.

    Args:
        at: its folder, which has passed ``check_component``.
        torch_dtype: of the weights in memory.
    """
    files, _ = weight_files(at, component, allow_pickle)
    if not any(read_header(file, allow_pickle=allow_pickle).scales for file in files):
        return None
    with building(f"{at} cannot be opened"):
        model = from_config(component.model_class, at)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    model.load_state_dict(_current_names(model, tensors), assign=True)
    return model.to(torch_dtype).eval()


def open_folder(folder: Path, family: Family, *, torch_dtype: torch.dtype, allow_pickle: bool) -> Any:
    """Load the pipeline of a folder that ``check_folder`` has passed.

    Raises: UserError: a library has something against its files all the same.
    """
    parts = parts_of(folder, family)
    variants = {weight_files(folder / component.name, component, allow_pickle)[1] for component in parts}
    opened = {
        component.name: open_scaled(
            folder / component.name, component, torch_dtype=torch_dtype, allow_pickle=allow_pickle
        )
        for component in parts
    }
    scaled = {name: model for name, model in opened.items() if model is not None}
    with building(f"{folder} cannot be opened"):
        return family.pipeline_class.from_pretrained(
            folder,
            dtype=torch_dtype,
            # a component without the variant is loaded plain
            variant=VARIANT if VARIANT in variants else None,
            use_safetensors=None if allow_pickle else True,
            local_files_only=True,
            **without_unused(family),
            **without_optional(family, parts),
            **scaled,
        )


def without_unused(family: Family) -> dict[str, Any]:
    """The arguments by which a pipeline of a family is built without the parts that nothing of ours calls."""
    known = inspect.signature(family.pipeline_class.__init__).parameters
    arguments = {"requires_safety_checker": False, **dict.fromkeys(UNUSED_COMPONENTS)}
    return {name: value for name, value in arguments.items() if name in known}


def without_optional(family: Family, parts: Sequence[Component]) -> dict[str, None]:
    """The arguments by which diffusers opens a pipeline without the optional parts that are not among ``parts``."""
    left_out = [one for one in family.components if one not in parts]
    return dict.fromkeys(name for one in left_out for name in (one.name, one.tokenizer) if name)


def copy_model(source: Path, target: Path, family: Family) -> None:
    """Copy of a stock folder what makes the model: its index, configs and weights; nothing that is not known.

    Args:
        source: has passed ``check_folder``.
        target: a new folder.
    Raises: UserError: a weight is NaN or infinite.
    """
    for name in (INDEX, FEW_STEPS):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    components = {component.name: component for component in parts_of(source, family)}
    tokenizers = [one.tokenizer for one in components.values() if one.tokenizer]
    for part in ("scheduler", *tokenizers, *components):
        files = config_files(source / part)
        if part in components:
            weights, _ = weight_files(source / part, components[part], allow_pickle=False)
            for file in weights:
                _check_all_finite(file)
            files += [*weights, *(source / part).glob("*.safetensors.index*.json")]
        (target / part).mkdir()
        for file in files:
            shutil.copyfile(file, target / part / file.name)


def _check_all_finite(file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:  # one of gigabytes at a time
        for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
            check_finite({name: tensors.get_tensor(name)}, str(file))


def weight_files(at: Path, component: Component, allow_pickle: bool) -> tuple[list[Path], str | None]:
    """The weight files in a component's folder and their variant, in the order in which diffusers prefers them."""
    stem = component.weights_name
    pickle_stem = "pytorch_model" if stem == "model" else stem
    kinds = [(f"{stem}.{{}}safetensors", f"{stem}.safetensors.index.{{}}json")]
    if allow_pickle:
        kinds.append((f"{pickle_stem}.{{}}bin", f"{pickle_stem}.bin.index.{{}}json"))
    for single, index in kinds:
        for variant, infix in ((None, ""), (VARIANT, f"{VARIANT}.")):
            if (at / single.format(infix)).is_file():
                return [at / single.format(infix)], variant
            if (at / index.format(infix)).is_file():
                return shards(at / index.format(infix)), variant
    pickles = sorted(at.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{at} has its weights only as a pickle ({pickles[0].name}), which can run code when it is opened. Get "
            "the safetensors version, or allow pickles (allow_pickle, --allow-pickle) if you trust it."
        )
    raise UserError(f"{at} holds no {stem}.safetensors. The folder is incomplete; download or save it again.")


def _current_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A component's tensors by the names that its class has now; older folders have older ones."""
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(tensors)
        return tensors
    # transformers 5.6 dropped a level of CLIPTextModel, but not of its twin with a projection
    if not any(name.startswith("text_model.") for name in model.state_dict()):
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    used = model.state_dict()
    return {name: tensor for name, tensor in tensors.items() if name in used or name not in _HARMLESS}
