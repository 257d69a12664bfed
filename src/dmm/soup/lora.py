"""LoRAs that come out: of LoRAs, exactly, or of the difference between two models, truncated."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dmm.errors import UserError
from dmm.families import FAMILIES, Family, title_of_lora, transformer_of
from dmm.files.digest import sha256
from dmm.files.outputs import check_file, new_file
from dmm.formats.lora import LowRank, kohya_name_of, lora_file, read_lora_file
from dmm.formats.tensors import check_finite, write_tensors
from dmm.soup.describing import describe_recipe, labelled_digests
from dmm.soup.ledger import check_digests
from dmm.soup.make import Bar, Made, digest_files, no_bar
from dmm.soup.plan import plan_soup
from dmm.soup.reading import Digests
from dmm.soup.recipe import SoupRecipe
from dmm.soup.sources import Source
from dmm.soup.stream import in_threads, num_threads
from dmm.soup.writing import sync_folder

ARCHITECTURE, KOHYA_NAME = "modelspec.architecture", "ss_base_model_version"
"""Metadata that tell a LoRA's family, as trainers write them."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")  # matrices, but no layers that a LoRA goes on


@dataclass(frozen=True)
class Factors:
    """What a LoRA adds to a layer: ``scaling * up @ down``.

    Attributes:
        down: (rank, in, ...).
        up: (out, rank, ...).
        scaling: alpha / rank.
    """

    down: Tensor
    up: Tensor
    scaling: float = 1.0


def make_lora(
    recipe: SoupRecipe,
    output: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    expected: Mapping[str, str] | None = None,
    digests: Digests | None = None,
    bar: Bar = no_bar,
) -> Made:
    """Make a LoRA in kohya's layout of LoRAs, or of the difference between a model and its base.

    Args: see :func:`dmm.soup.make.make_soup`; the recipe is of kind ``lora``.
    Raises: UserError: anything that the user can mend, before anything is written.
    """
    start = time.monotonic()
    if output.suffix != ".safetensors":
        raise UserError(f"'{output}': a LoRA is one file; name an output that ends in .safetensors.")
    check_file(output, overwrite=overwrite)
    make = _extract if recipe.method == "extract" else _combine
    layers, dtype, kind, found, sources, notes = make(
        recipe, num_threads(threads), digests or Digests(), expected or {}, bar
    )
    tensors: dict[str, Tensor] = {}
    for name, factors in layers.items():
        tensors |= _written(name, factors, dtype)
    check_finite(tensors, "the soup")
    ranks = {len(factors.down) for factors in layers.values()}
    metadata = {
        **describe_recipe(recipe, found, sources, output),
        **kind,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
    }
    with new_file(output, overwrite=overwrite) as temporary:
        write_tensors(temporary, tensors, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(output.resolve().parent)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return Made(output, len(tensors), num_bytes, time.monotonic() - start, tuple(notes))


def _written(layer: str, factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors in kohya's layout, or in diffusers' where its name is of that."""
    if not layer.startswith("lora_"):
        up = factors.up * factors.scaling
        return {f"{layer}.lora_A.weight": factors.down.to(dtype), f"{layer}.lora_B.weight": up.to(dtype)}
    return {
        f"{layer}.lora_down.weight": factors.down.to(dtype),
        f"{layer}.lora_up.weight": factors.up.to(dtype),
        f"{layer}.alpha": torch.tensor(factors.scaling * len(factors.down), dtype=torch.float32),
    }


def add_factors(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """The LoRA that adds what several add together: exact, at the sum of their ranks.

    Args:
        parts: of one layer, each with its weight. Where all share ``down`` and scaling, the rank stays.
    """
    first = parts[0][1]
    if all(part.scaling == first.scaling and part.down.equal(first.down) for _, part in parts):
        up = torch.stack([part.up.double() * weight for weight, part in parts]).sum(0)
        return Factors(first.down, up, first.scaling)
    down = torch.cat([part.down for _, part in parts])
    up = torch.cat([part.up.double() * (weight * part.scaling) for weight, part in parts], dim=1)
    return Factors(down, up)


def truncate_factors(factors: Factors, rank: int | None, energy: float | None) -> Factors:
    """The nearest LoRA of a smaller rank, by the singular value decomposition of the product; never of the whole.

    Args:
        rank: at most.
        energy: the share of the squared norm that is kept at least, if the rank allows.
    """
    up_basis, up_rest = torch.linalg.qr(factors.up.double().flatten(1))
    down_basis, down_rest = torch.linalg.qr(factors.down.double().flatten(1).T)
    left, values, right = torch.linalg.svd(up_rest @ down_rest.T * factors.scaling, full_matrices=False)
    count = choose_rank(values.square(), rank, energy)
    roots = values[:count].sqrt()
    down = (right[:count] * roots[:, None]) @ down_basis.T
    up = up_basis @ (left[:, :count] * roots)
    return Factors(down.reshape(count, *factors.down.shape[1:]), up.reshape(*up.shape, *factors.up.shape[2:]))


def factorise(difference: Tensor, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    """The LoRA nearest to a difference: a truncated singular value decomposition.

    Args:
        difference: (out, in, ...), of a layer's weight.
        rank, energy: see :func:`truncate_factors`.
    Returns: the LoRA, and the share of the squared norm that it keeps.
    Source: Eckart and Young 1936, https://doi.org/10.1007/BF02288367.
    """
    matrix = difference.double().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    # of the smaller of both products: its eigenvectors are the singular vectors, at a fraction of the work
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    count = choose_rank(squares, rank, energy)
    # what vanishes under rounding must not be divided by
    roots = squares[:count].sqrt().sqrt().clamp(min=1e-12)
    basis = vectors[:, :count]
    up, down = (basis * roots, (basis / roots).T @ matrix) if wide else (matrix @ (basis / roots), (basis * roots).T)
    kept = float(squares[:count].sum() / squares.sum()) if squares.sum() > 0 else 1.0
    ones = (1,) * (difference.ndim - 2)
    return Factors(down.reshape(count, *difference.shape[1:]), up.reshape(*up.shape, *ones)), kept


def choose_rank(squares: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values are kept.

    Args:
        squares: of the singular values, the largest first.
    """
    count = len(squares) if rank is None else min(rank, len(squares))
    if energy is not None:
        enough = int((squares.cumsum(0) < energy * squares.sum() * (1 - 1e-12)).sum()) + 1
        count = min(count, enough)
    return max(1, count)


# the factors, their dtype, what tells their family, digests and sources
_Result = tuple[dict[str, Factors], torch.dtype, Mapping[str, str], dict[str, str], dict[str, object], list[str]]


def _combine(recipe: SoupRecipe, _: int, __: Digests, expected: Mapping[str, str], bar: Bar) -> _Result:
    """LoRA with LoRA."""
    teachers = sorted(recipe.teachers, key=lambda teacher: teacher.name)
    weights = [recipe.weights.get(teacher.name, 1.0) for teacher in teachers]
    if recipe.method != "task_arithmetic":
        weights = [weight / math.fsum(weights) for weight in weights]
    parts: dict[str, list[tuple[float, Factors]]] = {}
    digests: dict[str, str] = {}
    sources: dict[str, object] = {}
    dtypes, kinds, titles = [], [], {}
    for teacher, weight in zip(teachers, weights, strict=True):
        assert teacher.lora is not None  # the recipe saw to it
        path = lora_file(teacher.lora)
        layers, dtype, kind, title = _read_factors(path)
        if title is not None:
            titles[teacher.name] = title
            _check_one_family(titles, path)
        dtypes.append(dtype)
        kinds.append(kind)
        digest = digests[f"the LoRA of teacher '{teacher.name}'"] = sha256(path)
        sources[digest] = {"name": path.name, "legacy_hash": None, "sd_merge_recipe": None}
        for name, factors in layers.items():
            parts.setdefault(name, []).append((weight * teacher.lora_scale, factors))
    check_digests(expected, digests)
    for name, of_layer in parts.items():
        shapes = {(factors.up.shape[0], factors.down.shape[1:]) for _, factors in of_layer}
        if len(shapes) > 1:
            raise UserError(f"The LoRAs have '{name}' for layers of different shapes. Merge LoRAs of one architecture.")
    result = {}
    with bar("merging", len(parts)) as progress:
        for name, of_layer in parts.items():
            result[name] = add_factors(of_layer)
            if recipe.rank is not None or recipe.energy is not None:
                result[name] = truncate_factors(result[name], recipe.rank, recipe.energy)
            progress(1)
    return result, _DTYPES.get(recipe.precision or "", dtypes[0]), kinds[0], digests, sources, []


def _extract(recipe: SoupRecipe, threads: int, digests: Digests, expected: Mapping[str, str], bar: Bar) -> _Result:
    """The difference between a model and its base."""
    # the layout of folders: its names are the layers' paths, which a LoRA's names are made of
    with plan_soup(recipe.model_copy(update={"method": "task_arithmetic"}), "folder") as plan:
        known = digest_files(plan, digests, threads, bar)
        found = labelled_digests(plan, known)
        check_digests(expected, found)
        family = plan.family if isinstance(plan.family, Family) else None
        layers, left = {}, []
        for tensor in plan.tensors:
            name = _layer_name(tensor.name, family)
            if tensor.copied or tensor.constant is not None:
                continue
            if name is None or len(tensor.declared.shape) not in (2, 4):
                left.append(tensor)
            else:
                layers[name] = tensor

        def run(base: Source, model: Source, progress: Callable[[int], object]) -> tuple[Factors, float] | None:
            difference = _whole(model) - _whole(base)
            factors = factorise(difference, recipe.rank, recipe.energy) if difference.any() else None
            progress(1)
            return factors

        calibrated = _calibrated(recipe, family)
        if recipe.calibration is not None:  # what of these it has left out is worth least
            layers = {name: tensor for name, tensor in layers.items() if not tensor.name.startswith(_denoiser(family))}
        with bar("decomposing", len(layers)) as progress:
            tasks = [partial(run, tensor.base, tensor.models[0], progress) for tensor in layers.values() if tensor.base]
            factors = in_threads(tasks, threads)
        changed = [name for name, one in zip(layers, factors, strict=True) if one is not None]
        if not changed and not calibrated:
            raise UserError("The model and its base do not differ in any layer that a LoRA can be on.")
        lost = sum(not torch.equal(_whole(tensor.models[0]), _whole(tensor.base)) for tensor in left if tensor.base)
        notes = []
        if calibrated:
            ranks = [len(one.down) for one in calibrated.values()]
            notes.append(f"calibrated: {len(ranks)} layers of the denoiser got ranks from {min(ranks)} to {max(ranks)}")
        if changed:
            mean = sum(one[1] for one in factors if one) / len(changed)
            notes.append(f"kept {mean:.1%} of a layer's squared difference, on average")
        if lost:
            notes.append(f"{lost} tensors differ that a LoRA does not carry (biases, norms, embeddings, the VAE)")
        names = {label: Path(str(path)).name for label, path in (("base", recipe.base), *_models(recipe))}
        sources: dict[str, object] = {
            found[label]: {"name": name, "legacy_hash": None} for label, name in names.items()
        }
        dtype = _DTYPES.get(recipe.precision or "", torch.float16)
        kept = {name: one[0] for name, one in zip(layers, factors, strict=True) if one is not None}
        kind = family.lora_metadata if family else {}
        kept = {**calibrated, **kept}
        return kept, dtype, kind, found, sources, notes


def _calibrated(recipe: SoupRecipe, family: Family | None) -> dict[str, Factors]:
    """The denoiser's layers of a recipe with a calibration, by kohya's names."""
    if recipe.calibration is None:
        return {}
    from dmm.soup.calibrated import calibrated_layers  # here, since plain soups run no models

    layers = {}
    for name, (part, shape) in calibrated_layers(recipe).items():
        up = part.up.reshape(*part.up.shape, *(1,) * (len(shape) - 2))
        layer = _layer_name(f"{_denoiser(family)}{name}", family)
        assert layer is not None  # a parameter's own name
        layers[layer] = Factors(part.down.reshape(len(part.down), *shape[1:]), up)
    return layers


def _denoiser(family: Family | None) -> str:
    """What the names of its tensors begin with in a folder."""
    assert family is not None  # its models were opened and asked
    return f"{family.denoiser.name}/"


def _models(recipe: SoupRecipe) -> list[tuple[str, str]]:
    return [(f"teacher '{teacher.name}'", str(teacher.model or recipe.base)) for teacher in recipe.teachers]


def _whole(source: Source) -> Tensor:
    return source.read(0, source.num_elements, torch.float64).reshape(source.shape)


def _check_one_family(titles: Mapping[str, str], path: Path) -> None:
    """Refuse LoRAs of several families.

    Args:
        titles: what each teacher's LoRA says that it is of.
        path: of the last one's.
    """
    first, *_, last = (*titles, *titles)
    one, other = titles[first], titles[last]
    if one not in other and other not in one:  # some can only say that they are of one of two
        raise UserError(
            f"teacher '{last}': {path} is a LoRA of {other}, that of teacher '{first}' of {one}. Merge LoRAs of one "
            "family."
        )


def _read_factors(path: Path) -> tuple[dict[str, Factors], torch.dtype, dict[str, str], str | None]:
    """A LoRA's layers by kohya's names, whatever its layout; the dtype that it is kept in; what tells its family.

    Raises: UserError: see :func:`read_lora_file`; or it is no plain LoRA, whose sum with others is one.
    """
    file = read_lora_file(path)
    title = title_of_lora(file.layers, file.metadata)
    family = next((one for one in FAMILIES.values() if one.title == title), None)
    layers = {}
    for layer, found in file.layers.items():
        form = found.form
        what = None
        if found.magnitude is not None:
            what = "is a DoRA"
        elif not isinstance(form, LowRank) or form.core is not None:
            what = "is a LoHa, LoKr, Tucker core or whole difference"
        elif found.bias is not None:
            what = "changes a bias, too"
        if what is not None or not isinstance(form, LowRank):
            raise UserError(
                f"{path}: the layer '{layer}' {what}, and only plain LoRAs add up to a LoRA. Bake it into a model "
                "(a soup of full models takes it), and extract a LoRA from that."
            )
        name = kohya_name_of(layer, family)
        if name is None:
            raise UserError(
                f"{path}: '{layer}' is a name of the original layout, whose blocks cannot be told without the model. "
                "Convert the LoRA to kohya's layout."
            )
        layers[name] = Factors(form.down.float(), form.up.float(), found.scaling)
    kind = {key: file.metadata[key] for key in (ARCHITECTURE, KOHYA_NAME) if key in file.metadata}
    return layers, file.dtype, kind, title


def _layer_name(tensor: str, family: Family | None) -> str | None:
    """Kohya's name of the layer whose weight a tensor is, or of a transformer's model diffusers'; None for what is no
    such layer's weight.
    """
    component, _, name = tensor.partition("/")
    if not name.endswith(".weight") or name.endswith(_EMBEDDINGS):
        return None
    if family is not None and transformer_of(family):  # kohya's layout counts their blocks otherwise
        changed = {family.denoiser.name, *(one.name for one in family.clips)}
        return f"{component}.{name.removesuffix('.weight')}" if component in changed else None
    return kohya_name_of(f"{component}.{name.removesuffix('.weight')}", family)
