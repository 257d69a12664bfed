"""The styles of a merged model, as they lie on disk beside a stock diffusers pipeline.

    model_index.json, unet/, vae/, text_encoder/    the stock pipeline
    styles/config.json                              the styles' names and the width D of their prompts
           diffusion_pytorch_model.safetensors      the prompts and the small network behind them, where D is not 0
           adapters.json, NAME.safetensors ...      what styles change of the weights, where they do

Nothing here knows ComfyUI, and nothing needs the package that made the merge.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

STYLES = "styles"


@dataclass(frozen=True, eq=False)
class StyleSet:
    """All styles of one merged model."""

    names: Sequence[str]
    prompts: Mapping[str, Tensor]
    """``embeddings`` (N, D), ``linear_1`` and ``linear_2`` with weight and bias, float32; empty where none."""
    adapters: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    """The files of the styles that change weights, by style."""

    def term(self, weights: Mapping[str, float]) -> Tensor | None:
        """What a mix adds to the embedding of the timestep: MLP(sum_i w_i e_i), mixed before the MLP.

        Args:
            weights: by style, summing to 1.
        Returns: (D,), float32; None where styles have no prompts.
        """
        if not self.prompts:
            return None
        each = torch.tensor([weights.get(name, 0.0) for name in self.names])
        mixed = each @ self.prompts["embeddings"]
        hidden = silu(linear(mixed, self.prompts["linear_1.weight"], self.prompts["linear_1.bias"]))
        return linear(hidden, self.prompts["linear_2.weight"], self.prompts["linear_2.bias"])

    def lora(self, style: str) -> dict[str, Tensor]:
        """What a style changes of the weights, as one LoRA by kohya's names; empty where it changes none."""
        tensors: dict[str, Tensor] = {}
        for file in self.adapters.get(style, ()):
            tensors.update(load_file(file))
        return tensors


def style_names(model: Path) -> list[str]:
    """The styles of a merged model's folder.

    Raises: ValueError: it is none.
    """
    path = model / STYLES / "config.json"
    if not path.is_file():
        raise ValueError(f"{model} has no {STYLES}/config.json: it is not the folder of a merged model.")
    return list(json.loads(path.read_text(encoding="utf-8"))["names"])


def read_styles(model: Path) -> StyleSet:
    """The styles of a merged model's folder, its adapters left on disk until they are asked for.

    Raises: ValueError: it is no merged model.
    """
    names, folder = style_names(model), model / STYLES
    prompts: dict[str, Tensor] = {}
    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["dim"]:
        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
        prompts = {name: tensor.float() for name, tensor in stored.items()}
    adapters: dict[str, list[Path]] = {}
    if (folder / "adapters.json").is_file():
        index = json.loads((folder / "adapters.json").read_text(encoding="utf-8"))["adapters"]
        # by name alone, so that an index leads to no other place
        adapters = {style: [folder / Path(file).name for file in one["files"]] for style, one in index.items()}
    return StyleSet(names, prompts, adapters)
