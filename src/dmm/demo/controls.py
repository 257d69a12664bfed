"""The embedded ControlNets of the embedded base: edges, blurred colours and silhouettes.

Each is stored as what makes it another than the copy of the base's encoder that it began as: low-rank changes of the
layers that it copied, and the layers that it does not have from there, in half precision. All of one file a control,
with a config that they share.
"""

import json
import shutil
from pathlib import Path

import platformdirs

from dmm.demo.assembly import COLLECTIONS, WEIGHTS, assembled, check_stored, experts
from dmm.files.digest import sha256

STORED = WEIGHTS / COLLECTIONS[0] / "controls"
INDEX = "controls.json"
CONFIG = "config.json"
EXAMPLE = "example.png"
UP, DOWN = ".up", ".down"
"""What the names of a layer's factors end with."""


def controls(*, cache: Path | None = None) -> dict[str, Path]:
    """Paths of the embedded ControlNets by name: stock diffusers folders, each with an ``example.png`` to try it on.

    The first call assembles them, 7 MB; later calls verify every file's sha256 and mend what does not match.

    Args:
        cache: where to keep them; by default the user's cache folder.
    Raises: UserError: a stored file is damaged, or the cache cannot be written.
    """
    index = json.loads((STORED / INDEX).read_text(encoding="utf-8"))
    folder = (cache or platformdirs.user_cache_path("dmm")) / f"controls-{sha256(STORED / INDEX)[:12]}"

    def assemble(building: Path) -> None:
        check_stored(STORED, index["files"])
        base = experts(cache=cache)["base"]
        for name in index["controls"]:
            _assemble(name, base, building / name)

    assembled(folder, assemble)
    return {name: folder / name for name in index["controls"]}


def _assemble(name: str, base: Path, folder: Path) -> None:
    # here, so that naming the controls needs no torch
    import torch

    from dmm.formats.folder import family_of_folder
    from dmm.formats.tensors import read_tensors, write_tensors

    tensors = read_tensors(STORED / f"{name}.safetensors")
    whole = {key: tensor for key, tensor in tensors.items() if not key.endswith((UP, DOWN))}
    own = read_tensors(base / family_of_folder(base).denoiser.name / "diffusion_pytorch_model.safetensors")
    for key in json.loads((STORED / INDEX).read_text(encoding="utf-8"))["copied"]:
        weight = own[key].float()
        if f"{key}{UP}" in tensors:
            up, down = tensors[f"{key}{UP}"].float(), tensors[f"{key}{DOWN}"].float()
            weight = weight + (up @ down).reshape(weight.shape)
        whole[key] = weight.to(torch.float16)
    folder.mkdir()
    write_tensors(folder / "diffusion_pytorch_model.safetensors", whole, {"format": "pt"})
    shutil.copyfile(STORED / CONFIG, folder / CONFIG)
    shutil.copyfile(STORED / f"{name}.png", folder / EXAMPLE)
