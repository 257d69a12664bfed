"""Making a soup: check, hash, measure, merge, write; whole or not at all."""

import inspect
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from dmm.families import Family
from dmm.files.digest import sha256
from dmm.files.outputs import check_disk, check_file, check_new_folder, new_file, new_folder
from dmm.formats.completing import complete_folder
from dmm.formats.folder import UNUSED_COMPONENTS, known_parts
from dmm.formats.schedules import write_scheduler_config
from dmm.formats.stock_files import config_files, read_index
from dmm.soup.describing import describe, labelled_digests
from dmm.soup.ledger import check_digests
from dmm.soup.models import Layout
from dmm.soup.plan import Plan, plan_soup
from dmm.soup.reading import Digests
from dmm.soup.recipe import SoupRecipe
from dmm.soup.stream import in_threads, measure, num_threads, write
from dmm.soup.writing import NewWeightFile, sync_folder

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Begins a stage: told its name and how much there is to do; gives what is told of what is done."""


@dataclass(frozen=True)
class Made:
    """A soup that was made.

    Attributes:
        num_bytes: of its weights.
        notes: what the user should be told.
    """

    path: Path
    num_tensors: int
    num_bytes: int
    seconds: float
    notes: tuple[str, ...]


def no_bar(_: str, __: int) -> AbstractContextManager[Callable[[int], object]]:
    """Show nothing."""
    return nullcontext(lambda _: None)


def make_soup(
    recipe: SoupRecipe,
    output: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    expected: Mapping[str, str] | None = None,
    digests: Digests | None = None,
    bar: Bar = no_bar,
    greedy: Mapping[str, object] | None = None,
) -> Made:
    """Merge full models without training.

    Args:
        recipe: of kind ``unet``, with any method but ``greedy``, which :func:`dmm.soup.greedy.make_greedy_soup` makes.
        output: a .safetensors file of the original layout; any other name is a stock diffusers folder.
        threads: by default as many as there are cores, and half of them where a method does little but read and write;
            the result is the same for any number.
        expected: sha256 by label, from a ledger, that the models must have.
        digests: what is known of files' sha256; by default the user's cache.
        greedy: what the ledger says of how the models were chosen.
    Raises: UserError: anything about the models, the recipe or the place that the user can mend, before anything is
        written; or a value that the output's dtype cannot hold, and then nothing is left of what was written.
    """
    start = time.monotonic()
    layout = layout_of(output)
    (check_file if layout == "file" else check_new_folder)(output, overwrite=overwrite)
    digests = digests or Digests()
    with plan_soup(recipe, layout) as plan:
        known = digest_files(plan, digests, num_threads(threads), bar)
        check_digests(expected or {}, labelled_digests(plan, known))
        threads = num_threads(threads, light=plan.method.light and not any(model.loras for model in plan.teachers))
        count = sum(tensor.declared.num_elements for tensor in plan.tensors)
        num_bytes = sum(tensor.declared.num_bytes for tensor in plan.tensors)
        check_disk(output, num_bytes, "the soup", "or name another output")
        if plan.method.measures is None:
            measured: dict[str, Tensor] = {}
        else:
            with bar("measuring", count) as progress:
                measured = measure(plan, threads, progress)
        metadata = describe(plan, known, output, greedy)
        with bar("merging", count) as progress:
            _write(plan, output, metadata, measured, threads, progress, overwrite)
        return Made(
            output,
            len(plan.tensors),
            sum(tensor.declared.num_bytes for tensor in plan.tensors),
            time.monotonic() - start,
            plan.notes,
        )


def layout_of(output: Path) -> Layout:
    """What an output's name asks for."""
    return "file" if output.suffix == ".safetensors" else "folder"


def digest_files(plan: Plan, digests: Digests, threads: int, bar: Bar) -> dict[Path, str]:
    """Sha256 of all that is read, every value of it being finite."""
    files = plan.files
    with bar("reading", sum(file.num_bytes for file in files)) as progress:
        found = in_threads([partial(file.digest, digests, progress) for file in files], threads)
    digests.save()
    loras = {lora for model in plan.teachers for lora in model.loras}
    return {**{file.path: digest for file, digest in zip(files, found, strict=True)}, **{p: sha256(p) for p in loras}}


def _write(
    plan: Plan,
    output: Path,
    metadata: Mapping[str, str],
    measured: Mapping[str, Tensor],
    threads: int,
    progress: Callable[[int], object],
    overwrite: bool,
) -> None:
    place = (
        new_file(output, overwrite=overwrite)
        if plan.layout == "file"
        else new_folder(output, overwrite=overwrite, parts=known_parts())
    )
    with place as temporary:
        by_path: dict[Path, list[int]] = {}
        for i, tensor in enumerate(plan.tensors):
            path = temporary if plan.layout == "file" else temporary / weights_path(tensor.name)
            by_path.setdefault(path, []).append(i)
        if plan.layout == "folder":
            _copy_configs(plan, temporary)
        with ExitStack() as stack:
            files = {}
            opened = []
            for path, indices in by_path.items():
                tensors = {_name_in(plan, plan.tensors[i].name): plan.tensors[i].declared for i in indices}
                path.parent.mkdir(parents=True, exist_ok=True)
                file = NewWeightFile(path, tensors, metadata)
                opened.append(file)
                stack.callback(file.close)
                files.update({plan.tensors[i].name: (file, _name_in(plan, plan.tensors[i].name)) for i in indices})
            write(plan, files, measured, threads, progress)
            for source in plan.files:
                source.check_unchanged()
            for file in opened:
                file.sync()
        if plan.layout == "folder":
            for folder in {path.parent for path in temporary.rglob("*")}:
                sync_folder(folder)
    sync_folder(output.resolve().parent)


def weights_path(name: str) -> Path:
    """Where a folder keeps a tensor of the name ``component/...``."""
    component = name.split("/", 1)[0]
    stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
    return Path(component) / f"{stem}.safetensors"


def _name_in(plan: Plan, name: str) -> str:
    return f"{plan.prefix}{name}" if plan.layout == "file" else name.split("/", 1)[1]


def _copy_configs(plan: Plan, folder: Path) -> None:
    """All of a stock folder but its weights; it says what these models predict, and has no safety checker."""
    assert plan.configs is not None  # the plan saw to it
    index = read_index(plan.configs)
    for name in UNUSED_COMPONENTS:
        if name in index:
            index[name] = [None, None]
    if isinstance(plan.family, Family):  # the configs may be of a pipeline that has more parts
        stock = inspect.signature(plan.family.pipeline_class.__init__).parameters
        index = {name: part for name, part in index.items() if name.startswith("_") or name in stock}
        index["_class_name"] = plan.family.pipeline_class.__name__
        if "requires_safety_checker" in stock:
            index["requires_safety_checker"] = False
    assert plan.scheduler is not None  # the configs have one
    index["scheduler"] = ["diffusers", plan.scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in sorted(name for name, value in index.items() if isinstance(value, list) and value[0]):
        (folder / name).mkdir()
        for file in config_files(plan.configs / name):
            shutil.copyfile(file, folder / name / file.name)
    write_scheduler_config(plan.scheduler, folder)
    complete_folder(folder)
