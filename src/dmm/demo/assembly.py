"""The embedded experts, stored once a component, assembled into whole models in the user's cache.

``weights/`` holds a collection of experts for each family, every component once, in half precision, and its
``experts.json``, which says what each expert is made of and the sha256 of every stored file; the VAE and the judge are
all collections'. :func:`experts` puts them together as people keep them: stock pipeline folders, a single-file
checkpoint, LoRAs.
"""

import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from dmm.errors import UserError
from dmm.files.digest import sha256

if TYPE_CHECKING:
    from dmm.models.teachers import ModelSource

WEIGHTS = Path(__file__).with_name("weights")
PLAN = "experts.json"
COLLECTIONS = tuple(sorted(plan.parent.name for plan in WEIGHTS.glob(f"*/{PLAN}")))
"""The families that there are experts of; the first is meant where none is named."""
RECORD = "assembled.json"


def experts(family: str = COLLECTIONS[0], *, cache: Path | None = None) -> dict[str, Path]:
    """Paths of the embedded experts by style name; ``base``, which they were fine-tuned from, comes first.

    A folder is a stock pipeline; a file is a single-file checkpoint, or a LoRA for ``base``
    (:func:`expert_sources` says which). A name that ends in ``-v`` is of an expert that predicts velocity. The first
    call assembles them, up to 70 MB; later calls verify every file's sha256 and mend what does not match.

    Args:
        family: one of :data:`COLLECTIONS`.
        cache: where to keep them; by default the user's cache folder.
    Raises: UserError: there is no such collection, a stored file is damaged, or the cache cannot be written.
    """
    plan = _plan(family)
    folder = (cache or platformdirs.user_cache_path("dmm")) / f"experts-{sha256(WEIGHTS / family / PLAN)[:12]}"
    assembled(folder, lambda building: _assemble(WEIGHTS / family, plan, building))
    return {name: folder / expert["path"] for name, expert in plan["experts"].items()}


def expert_sources(family: str = COLLECTIONS[0], *, cache: Path | None = None) -> dict[str, "ModelSource"]:
    """The embedded experts as :func:`dmm.models.teachers.open_pipeline` takes them, by style name, ``base`` first.

    Arguments and errors are those of :func:`experts`.
    """
    from dmm.models.teachers import ModelSource  # here, so that listing the experts needs no torch

    paths = experts(family, cache=cache)
    base = paths["base"]
    sources = {
        "folder": lambda path: ModelSource(path),
        "single_file": lambda path: ModelSource(path, config=base),
        "lora": lambda path: ModelSource(base, loras=((path, 1.0),)),
    }
    forms = expert_forms(family)
    return {name: sources[forms[name]](path) for name, path in paths.items()}


def expert_forms(family: str = COLLECTIONS[0]) -> dict[str, str]:
    """In what form each of :func:`experts` comes: ``folder``, ``single_file`` or ``lora``."""
    return {name: expert["form"] for name, expert in _plan(family)["experts"].items()}


def _plan(family: str) -> dict[str, Any]:
    if family not in COLLECTIONS:
        raise UserError(f"There are no embedded experts of '{family}'; there are of {', '.join(COLLECTIONS)}.")
    plan: dict[str, Any] = json.loads((WEIGHTS / family / PLAN).read_text(encoding="utf-8"))
    return plan


def assembled(folder: Path, assemble: Callable[[Path], None]) -> None:
    """Have a folder of the cache hold what is put together once, whole; what does not match its record is mended.

    Args:
        assemble: fills a new folder.
    Raises: UserError: the cache cannot be written.
    """
    if _is_whole(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")  # tempfile's would be its owner's only
        building.mkdir()
        try:
            assemble(building)
            files = sorted(path for path in building.rglob("*") if path.is_file())
            record = {path.relative_to(building).as_posix(): sha256(path) for path in files}
            (building / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            # another process may have been faster: what stands there by then is as good if it is whole
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"The embedded models could not be written to '{folder}': {error.strerror}. "
            "Free some space there, or set XDG_CACHE_HOME to another folder."
        ) from error


def check_stored(stored: Path, files: Mapping[str, str]) -> None:
    """Check the sha256 of stored files, by their paths below a folder.

    Raises: UserError: one is damaged.
    """
    for path, digest in files.items():
        if sha256(stored / path) != digest:
            raise UserError(f"'{stored / path}' is damaged: its sha256 is not the recorded one. Install dmm again.")


def _is_whole(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return all(sha256(folder / path) == digest for path, digest in record.items())
    except (OSError, ValueError):
        return False


def _assemble(stored: Path, plan: dict[str, Any], building: Path) -> None:
    check_stored(stored, plan["files"])
    for expert in plan["experts"].values():
        _FORMS[expert["form"]](stored, expert, building)


def _assemble_folder(stored: Path, expert: dict[str, Any], root: Path) -> None:
    folder = root / expert["path"]
    shutil.copytree(stored / "configs", folder)
    for target, source in expert["weights"].items():
        shutil.copy(stored / source, folder / target)
    config = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | expert["scheduler"]
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _assemble_single_file(stored: Path, expert: dict[str, Any], root: Path) -> None:
    # here, so that listing the experts needs no torch
    import torch

    from dmm.models.libraries import quietly

    with quietly(), tempfile.TemporaryDirectory(dir=root) as parts:
        # within, for importing the libraries has them speak, too
        from dmm.formats.configs import FOLLOWS_KEY
        from dmm.formats.single_file import save_single_file
        from dmm.models.teachers import ModelSource, open_pipeline

        _assemble_folder(stored, {**expert, "path": "folder"}, Path(parts))
        pipeline = open_pipeline(ModelSource(Path(parts) / "folder"), torch_dtype=torch.float16)
        metadata = {
            "modelspec.title": Path(expert["path"]).stem,
            "modelspec.prediction_type": expert["scheduler"]["prediction_type"],
            FOLLOWS_KEY: "./base",  # not the folder of parts, which goes
        }
        save_single_file(pipeline, root / expert["path"], dtype=torch.float16, metadata=metadata)


def _copy_lora(stored: Path, expert: dict[str, Any], root: Path) -> None:
    shutil.copy(stored / expert["lora"], root / expert["path"])


_FORMS = {"folder": _assemble_folder, "single_file": _assemble_single_file, "lora": _copy_lora}
