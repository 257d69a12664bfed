"""Put what was trained into the package: every component once, in half precision, with its sha256.

Reads ``vae/``, ``base/``, ``experts/`` and ``judge/`` below the work folder and replaces
``src/dmm/demo/weights/``.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmm.demo.assembly import PLAN, WEIGHTS
from dmm.files.digest import sha256
from dmm.formats.tensors import check_finite, write_tensors
from drawings import STYLES

# how each expert is kept: people's collections hold all of these
SINGLE_FILES = ("twemoji",)
OWN_TEXT_ENCODER = ("noto-blob",)
V_PREDICTION = ("noto-v",)
LORA_RANK = 10  # of 16 that were trained: what fits into the limit
LIMIT = 40e6  # bytes


def store(source: Path, target: Path, prefix: str = "") -> None:
    """Copy a safetensors file in half precision, its names after ``prefix``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: tensor.to(torch.float16) for name, tensor in load_file(source).items()}
    check_finite(tensors, str(source))
    write_tensors(target, tensors, {"format": "pt"})


def store_text_encoder(pipeline: Path, target: Path) -> None:
    """Copy a text encoder under the names of all published ones; one built from a config lacks their first level."""
    source = pipeline / "text_encoder" / "model.safetensors"
    flat = not any(name.startswith("text_model.") for name in load_file(source))
    store(source, target, prefix="text_model." if flat else "")


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


def forget_path(config: Path) -> None:
    """Leave out of a config where its model lay while it was trained."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    base, experts = args.work / "base", args.work / "experts"
    shutil.rmtree(WEIGHTS, ignore_errors=True)

    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(base, WEIGHTS / "configs", ignore=ignored)
    forget_path(WEIGHTS / "configs" / "vae" / "config.json")
    store(base / "vae" / "diffusion_pytorch_model.safetensors", WEIGHTS / "vae.safetensors")

    plan: dict[str, dict[str, str]] = {}
    for name in ("base", *STYLES, *V_PREDICTION):
        folder = base if name == "base" else experts / name
        if not folder.is_dir():
            store_lora(folder.with_name(f"{name}.safetensors"), WEIGHTS / "lora" / f"{name}.safetensors", LORA_RANK)
            plan[name] = {"form": "lora", "path": f"{name}.safetensors", "lora": f"lora/{name}.safetensors"}
            continue
        store(folder / "unet" / "diffusion_pytorch_model.safetensors", WEIGHTS / "unet" / f"{name}.safetensors")
        text_encoder = f"text_encoder/{name if name in OWN_TEXT_ENCODER else 'base'}.safetensors"
        if not (WEIGHTS / text_encoder).exists():
            store_text_encoder(folder, WEIGHTS / text_encoder)
        is_single = name in SINGLE_FILES
        plan[name] = {
            "form": "single_file" if is_single else "folder",
            "path": f"{name}.safetensors" if is_single else name,
            "unet": f"unet/{name}.safetensors",
            "vae": "vae.safetensors",
            "text_encoder": text_encoder,
            "prediction_type": "v_prediction" if name in V_PREDICTION else "epsilon",
        }

    judge = WEIGHTS / "judge"
    shutil.copytree(args.work / "judge", judge, ignore=ignored)
    store(args.work / "judge" / "diffusion_pytorch_model.safetensors", judge / "diffusion_pytorch_model.safetensors")
    files = sorted(path for path in WEIGHTS.rglob("*") if path.is_file())
    digests = {path.relative_to(WEIGHTS).as_posix(): sha256(path) for path in files}
    (WEIGHTS / PLAN).write_text(json.dumps({"experts": plan, "files": digests}, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(f"That is more than {LIMIT / 1e6:g} MB.")


if __name__ == "__main__":
    main()
