"""What lies in a folder that could be merged, what to learn on, and which model the others came from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmm.data import ImageFolder
from dmm.errors import UserError
from dmm.files.digest import sha256
from dmm.files.prompts import read_prompts
from dmm.files.runs import INDEX
from dmm.files.weights import PICKLE_SUFFIXES
from dmm.formats.detect import family_of_file
from dmm.formats.folder import family_of_folder
from dmm.formats.lora import is_lora
from dmm.formats.tensors import read_header

_WEIGHTS = (".safetensors", *PICKLE_SUFFIXES)
# words in the names of models that others were made from; a first name only as a whole, since tunes have it too
_BASES = re.compile(
    r"(?:^|[^a-z])(?:base|pruned|emaonly|v1[-_.]?[45])(?:[^a-z]|$)"
    r"|^(?:sd|stable[-_. ]?diffusion)[-_. ]?(?:v?\d(?:[-_.]?\d)?|xl)?$",
    re.IGNORECASE,
)
# what kohya's scripts call the model that a LoRA was trained on: its digest, and its file
_TRAINED_ON = ("ss_new_sd_model_hash", "ss_sd_model_name")


@dataclass(frozen=True)
class Found:
    """A model or a LoRA.

    Attributes:
        family: its name; None of a LoRA, which is tried on a model.
        metadata: that its file has.
    """

    path: Path
    family: str | None
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Contents:
    """What a folder has.

    Attributes:
        refused: what is no model that could be merged, and why.
        images, prompts: what to learn on, where there is some.
    """

    models: Sequence[Found]
    loras: Sequence[Found]
    refused: Mapping[Path, str]
    images: Path | None
    prompts: Path | None


def find_models(folder: Path) -> Contents:
    """Look at everything in a folder, by headers and configs; what is twice there is refused the second time.

    Raises: UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder; name one that holds models.")
    models: list[Found] = []
    loras: list[Found] = []
    refused: dict[Path, str] = {}
    for path in _candidates(folder):
        try:
            if path.is_dir():
                models.append(Found(path, family_of_folder(path).name, {}))
                continue
            header = read_header(path)
            if is_lora(header.tensors):
                loras.append(Found(path, None, header.metadata))
            else:
                models.append(Found(path, family_of_file(path, header).name, header.metadata))
        except UserError as error:
            refused[path] = str(error).removeprefix(f"{path}").lstrip(": ")
    for copy, of in _copies([*models, *loras]):
        refused[copy.path] = f"the same as {of.path.name}, byte by byte"
    models, loras = ([one for one in some if one.path not in refused] for some in (models, loras))
    return Contents(models, loras, refused, _images(folder), _prompts(folder))


def base_of_all(contents: Contents) -> tuple[Found | None, str]:
    """The model that the others came from, as far as that can be known, and by what.

    Returns: None where nothing tells.
    """
    for lora in contents.loras:
        for model in contents.models:
            if model.path.is_file() and _was_trained_on(lora, model):
                return model, f"{lora.path.name} says that it was trained on it"
    named = [model for model in contents.models if _BASES.search(model.path.stem)]
    if named:
        return min(named, key=lambda one: len(one.path.name)), "its name says so"
    if len(contents.models) == 1 and contents.loras:
        return contents.models[0], "the only model, with LoRAs beside it"
    return None, ""


def _was_trained_on(lora: Found, model: Found) -> bool:
    told = {lora.metadata.get(key) for key in _TRAINED_ON} - {None, ""}
    if model.path.name in told or model.path.stem in told:
        return True
    return any(re.fullmatch("[0-9a-f]{64}", str(one)) for one in told) and sha256(model.path) in told


def _candidates(folder: Path) -> list[Path]:
    """Pipeline folders, and weight files that are in none."""
    pipelines = sorted(index.parent for index in folder.rglob(INDEX))
    pipelines = [one for one in pipelines if not any(other in one.parents for other in pipelines)]
    files = sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS and path.is_file())
    return [*pipelines, *(path for path in files if not any(one in path.parents for one in pipelines))]


def _copies(found: Iterable[Found]) -> list[tuple[Found, Found]]:
    """Files that are equal to an earlier one: only those of one size are read."""
    by_size: dict[int, list[Found]] = {}
    for one in found:
        if one.path.is_file():
            by_size.setdefault(one.path.stat().st_size, []).append(one)
    copies = []
    for alike in by_size.values():
        first: dict[str, Found] = {}
        for one in alike if len(alike) > 1 else ():
            before = first.setdefault(sha256(one.path), one)
            if before is not one:
                copies.append((one, before))
    return copies


def _images(folder: Path) -> Path | None:
    """A folder of captioned pictures."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if (place / INDEX).is_file():
            continue
        try:
            if any(ImageFolder(place).captions):
                return place
        except UserError:
            continue
    return None


def _prompts(folder: Path) -> Path | None:
    for path in sorted(folder.glob("*prompt*.txt")):
        try:
            read_prompts(path)
        except UserError:
            continue
        return path
    return None
