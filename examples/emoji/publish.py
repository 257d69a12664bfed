"""Put what was trained into the package: every component once, in half precision, with its sha256.

Reads what was trained below the work folder, each family's base and experts, the VAE and the judge, and replaces what
``src/dmm/demo/weights/`` holds.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dmm.demo.assembly import PLAN, WEIGHTS
from dmm.files.digest import sha256
from dmm.formats.tensors import check_finite, write_tensors
from drawings import STYLES

CONTROLS = "controls"
LIMIT = 67e6  # bytes, of which the ControlNets take up to 3
EPSILON: dict[str, Any] = {"prediction_type": "epsilon"}
ZERO_SNR: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def store(source: Path, target: Path) -> None:
    """Copy a safetensors file in half precision."""
    write_half(load_file(source), target, str(source))


def write_half(tensors: Mapping[str, Tensor], target: Path, told: str) -> None:
    """Write tensors in half precision, if they fit into it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    check_finite(halves, told)
    write_tensors(target, halves, {"format": "pt"})


def store_text_encoder(source: Path, target: Path) -> None:
    """Copy a text encoder under the names of all published ones; one built from a config lacks their first level."""
    level = "text_model."
    tensors = load_file(source)
    named = {
        name if name.startswith((level, "text_projection.")) else level + name: tensor
        for name, tensor in tensors.items()
    }
    write_half(named, target, str(source))


def store_lora(source: Path, target: Path, rank: int) -> None:
    """Copy a kohya LoRA in half precision, each layer's update cut to ``rank`` by its singular values."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors, cut, kept = load_file(source), {}, []
    for name in sorted(key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")):
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        scale = tensors[f"{name}.alpha"] / len(down)
        u, s, v = torch.linalg.svd(scale * up.flatten(1) @ down.flatten(1), full_matrices=False)
        kept.append((s[:rank].square().sum() / s.square().sum()).item())
        root = s[:rank].sqrt()
        cut[f"{name}.lora_down.weight"] = (root[:, None] * v[:rank]).reshape(rank, *down.shape[1:]).to(torch.float16)
        cut[f"{name}.lora_up.weight"] = (u[:, :rank] * root).reshape(len(up), rank, *up.shape[2:]).to(torch.float16)
        cut[f"{name}.alpha"] = torch.tensor(float(rank))
    with safe_open(source, "pt") as file:
        metadata = {**file.metadata(), "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    write_tensors(target, cut, metadata)
    mean = sum(kept) / len(kept)
    print(f"{source.name}: rank {rank} keeps {mean:.1%} of the layers' squared norms, {min(kept):.1%} at least")


def write_compactly(path: Path) -> None:
    """Write a JSON file anew without spaces between its values."""
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value, separators=(",", ":"), ensure_ascii=False), encoding="utf-8")


def forget_path(config: Path) -> None:
    """Leave out of a config where its model lay while it was trained."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Collection:
    """How the experts of one family are kept; people's collections hold all of these forms.

    Attributes:
        prefix: of the family's folders below the work folder.
        names: of the experts, in order.
        single_files, own_text_encoder: which of them are, and have.
        schedulers: what an expert's scheduler is told beyond that of the base.
        lora_rank: of those that were trained: what fits into the limit; None where they were trained so.
        scheduler: what others than those in ``schedulers`` are told.
        shared: whole components that are kept once, for another family, by the components' names.
    """

    prefix: str
    names: tuple[str, ...]
    single_files: tuple[str, ...]
    own_text_encoder: tuple[str, ...]
    schedulers: Mapping[str, Mapping[str, Any]]
    lora_rank: int | None
    scheduler: Mapping[str, Any] = field(default_factory=lambda: EPSILON)
    shared: Mapping[str, str] = field(default_factory=dict)


COLLECTIONS = {
    "sd1": Collection(
        "", (*STYLES, "noto-v"), ("twemoji",), ("noto-blob",), {"noto-v": {"prediction_type": "v_prediction"}}, 10
    ),
    "sdxl": Collection("sdxl-", ("noto", "openmoji", "fluent-v"), (), (), {"fluent-v": ZERO_SNR}, 5),
    "sd3": Collection(
        "sd3-",
        ("noto", "openmoji", "fluent-contrast"),
        (),
        (),
        {},
        None,
        scheduler={},
        shared={"text_encoder_2": "../sdxl/text_encoder_2/base.safetensors"},
    ),
}


def store_components(
    pipeline: Path, name: str, family: Path, *, own_text_encoder: bool, shared: Mapping[str, str]
) -> dict[str, str]:
    """Copy a pipeline's weights, but for the VAE, which is everyone's.

    Returns: what each weight file of the pipeline's folder is kept as, below ``family``.
    """
    kept = {"vae/diffusion_pytorch_model.safetensors": "../vae.safetensors"}
    for weights in sorted(pipeline.glob("*/*.safetensors")):
        component = weights.parent.name
        if component == "vae":
            continue
        if component in shared:
            kept[f"{component}/{weights.name}"] = shared[component]
            continue
        is_shared = component.startswith("text_encoder") and not own_text_encoder
        target = f"{component}/{'base' if is_shared else name}.safetensors"
        if not (family / target).exists():
            (store_text_encoder if component.startswith("text_encoder") else store)(weights, family / target)
        kept[f"{component}/{weights.name}"] = target
    return kept


def publish(work: Path, family: str, collection: Collection) -> None:
    """Replace a family's folder of the package."""
    base, experts = work / f"{collection.prefix}base", work / f"{collection.prefix}experts"
    folder = WEIGHTS / family
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != CONTROLS:  # those are published by themselves
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(base, folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    forget_path(folder / "configs" / "vae" / "config.json")
    for tokenizer in folder.glob("configs/*/tokenizer.json"):
        write_compactly(tokenizer)
    plan: dict[str, dict[str, Any]] = {}
    for name in ("base", *collection.names):
        source = base if name == "base" else experts / name
        if not source.is_dir():
            file, kept = source.with_name(f"{name}.safetensors"), folder / "lora" / f"{name}.safetensors"
            if collection.lora_rank is None:
                store(file, kept)
            else:
                store_lora(file, kept, collection.lora_rank)
            plan[name] = {"form": "lora", "path": f"{name}.safetensors", "lora": f"lora/{name}.safetensors"}
            continue
        is_single = name in collection.single_files
        plan[name] = {
            "form": "single_file" if is_single else "folder",
            "path": f"{name}.safetensors" if is_single else name,
            "weights": store_components(
                source,
                name,
                folder,
                own_text_encoder=name in collection.own_text_encoder,
                shared=collection.shared,
            ),
            "scheduler": collection.schedulers.get(name, collection.scheduler),
        }
    files = [path for path in folder.rglob("*") if path.is_file() and CONTROLS not in path.parts]
    shared = [folder / path for path in collection.shared.values()]
    shared += [WEIGHTS / "vae.safetensors", *(path for path in (WEIGHTS / "judge").rglob("*") if path.is_file())]
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}
    digests |= {f"../{path.resolve().relative_to(WEIGHTS).as_posix()}": sha256(path) for path in sorted(shared)}
    (folder / PLAN).write_text(json.dumps({"experts": plan, "files": digests}, indent=1) + "\n", encoding="utf-8")
    print(f"{family}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--family", choices=COLLECTIONS, help="only this family's; the VAE and the judge stay, too")
    args = parser.parse_args()
    if args.family is None:
        store(args.work / "base" / "vae" / "diffusion_pytorch_model.safetensors", WEIGHTS / "vae.safetensors")
        judge = WEIGHTS / "judge"
        shutil.rmtree(judge, ignore_errors=True)
        shutil.copytree(args.work / "judge", judge, ignore=shutil.ignore_patterns("*.safetensors"))
        store(
            args.work / "judge" / "diffusion_pytorch_model.safetensors", judge / "diffusion_pytorch_model.safetensors"
        )
    for family in [args.family] if args.family else COLLECTIONS:
        publish(args.work, family, COLLECTIONS[family])
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in all")
    if size > LIMIT:
        raise SystemExit(f"That is more than {LIMIT / 1e6:g} MB.")


if __name__ == "__main__":
    main()
