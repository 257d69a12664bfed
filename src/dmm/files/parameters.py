"""The PNG text chunk ``parameters``: what a picture was made from, in the form that image tools read.

::

    a red cat, sitting <lora:ink:0.8>
    Negative prompt: blurry
    Steps: 25, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, Model: v1-5

and of a picture that LoRAs took part in a last ``Lora hashes: "ink: 0af5c2f8f4d1"``.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dmm.errors import UserError
from dmm.files.digest import sha256

_FIELD = re.compile(r'\s*([\w ]+): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class UsedLora:
    """A LoRA that a picture was made with; its hash is that of :func:`lora_hash`."""

    name: str
    scale: float
    hash: str


@dataclass(frozen=True)
class Parameters:
    """What a picture, or a grid of pictures, was made from.

    Attributes:
        prompt: of a grid, one a line.
        seed: of a grid, all of them, as in "0-7".
        width, height: of one picture, in pixels.
        model: the model's name.
        model_hash: see :func:`model_hash`.
        style: of a merged model, as ``--style`` reads it, "ink=0.7,photo=0.3"; of a grid, all of them, "ink; photo".
        loras: those that were on the model.
        plugins: what else it was made with, such as "Denoising strength", by name.
    """

    prompt: str
    negative_prompt: str
    steps: int
    sampler: str
    guidance_scale: float
    seed: str
    width: int
    height: int
    model: str
    model_hash: str | None = None
    style: str | None = None
    loras: Sequence[UsedLora] = ()
    plugins: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        fields = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_hash,
            "Model": self.model,
            "Style": self.style,
        }
        if self.loras:
            fields["Lora hashes"] = ", ".join(f"{lora.name}: {lora.hash}" for lora in self.loras)
        fields |= self.plugins
        lines = [" ".join([self.prompt, *(f"<lora:{lora.name}:{lora.scale:g}>" for lora in self.loras)]).lstrip()]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items() if value is not None))
        return "\n".join(lines)


def read_parameters(path: Path) -> dict[str, str]:
    """The ``parameters`` of a PNG by name: "Prompt", "Negative prompt" (if any), "Steps", "Seed" and so on.

    Raises: UserError: the file is no picture, or carries no ``parameters``.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get("parameters")
    except OSError as error:
        raise UserError(f"'{path}' could not be read as a picture: {error}") from error
    if text is None:
        raise UserError(f"The picture '{path}' carries no text chunk 'parameters'.")
    body, _, last = text.rpartition("\n")
    prompt, _, negative = body.partition("\nNegative prompt: ")
    found = {"Prompt": prompt} | ({"Negative prompt": negative} if negative else {})
    for name, value in _FIELD.findall(last):
        found[name] = json.loads(value) if value.startswith('"') else value
    return found


def model_hash(model: Path, denoiser: str) -> str | None:
    """The first ten hex digits of the sha256 of a single file, or of a pipeline folder's denoiser's weights.

    Of weights in several shards, the digest of all their digests. None for what is not on disk.

    Args:
        denoiser: what the model's family calls it.
    """
    if model.is_file():
        return sha256(model)[:10]
    folder = model / denoiser
    for pattern in (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model-*.safetensors",
        "diffusion_pytorch_model.bin",
        "*.safetensors",
    ):
        if files := sorted(folder.glob(pattern)):
            digests = [sha256(file) for file in files]
            return (digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:10]
    return None


def lora_hash(path: Path) -> str:
    """The twelve hex digits by which A1111 knows a LoRA.

    Of a .safetensors file what kohya's scripts wrote into its metadata as ``sshs_model_hash``, or else the sha256 of
    what follows its header, so that other metadata make no other LoRA of it; of any other file its sha256.
    """
    if path.suffix.lower() != ".safetensors":
        return sha256(path)[:12]
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        told: str | None = (header.get("__metadata__") or {}).get("sshs_model_hash")
        return (told or hashlib.file_digest(file, "sha256").hexdigest())[:12]


def _quoted(value: str) -> str:
    # the convention of the tools that read this: JSON where a comma or colon would break the line apart
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value
