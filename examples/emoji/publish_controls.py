"""Put the ControlNets that train_controlnet.py trained into the package: small, as changes of the base's encoder."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmm.demo import experts
from dmm.demo.controls import CONFIG, DOWN, EXAMPLE, INDEX, STORED, UP
from dmm.files.digest import sha256
from publish import write_half
from train_controlnet import CONTROLS

LIMIT = 3e6  # bytes
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--controls", type=Path, required=True, help="the folder that train_controlnet.py wrote")
    parser.add_argument("--rank", type=int, default=16, help="that they were trained with")
    args = parser.parse_args()
    base = load_file(experts()["base"] / "unet" / WEIGHTS_FILE)
    shutil.rmtree(STORED, ignore_errors=True)
    STORED.mkdir()
    copied: list[str] = []
    for name in CONTROLS:
        net = load_file(args.controls / name / WEIGHTS_FILE)
        copied = [key for key in net if key in base]
        stored = {key: tensor for key, tensor in net.items() if key not in base}
        for key in copied:
            difference = net[key] - base[key].float()
            if difference.any():
                stored |= factors(key, difference, args.rank)
        write_half(stored, STORED / f"{name}.safetensors", name)
        shutil.copyfile(args.controls / name / EXAMPLE, STORED / f"{name}.png")
    config = json.loads((args.controls / CONTROLS[0] / CONFIG).read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    (STORED / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    files = {path.name: sha256(path) for path in sorted(STORED.iterdir())}
    index = {"controls": CONTROLS, "copied": copied, "files": files}
    (STORED / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in STORED.iterdir())
    print(f"{len(CONTROLS)} ControlNets, {size / 1e6:.2f} MB")
    if size > LIMIT:
        raise SystemExit(f"That is more than {LIMIT / 1e6:g} MB.")


def factors(key: str, difference: Tensor, rank: int) -> dict[str, Tensor]:
    """The two factors of a layer's change, which is of that rank."""
    u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    lost = s[rank:].norm() / s.norm()
    if lost > 1e-3:
        raise SystemExit(f"{key}: {lost:.1%} of the change is beyond rank {rank}.")
    root = s[:rank].sqrt()
    return {f"{key}{UP}": u[:, :rank] * root, f"{key}{DOWN}": root[:, None] * v[:rank]}


if __name__ == "__main__":
    main()
