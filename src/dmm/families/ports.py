"""What the layer at a family's port is given: a function of the timestep alone."""

from typing import Any

import torch
from torch import Tensor, nn

_LAST = 1000.0


@torch.no_grad()
def hidden(denoiser: Any, port: str, timesteps: Tensor) -> Tensor:
    """What the layer at the port is given at each timestep.

    Args:
        denoiser: embeds frequencies of the timestep by two linear layers, of which the port's is the second.
        timesteps: (T,), from 0 to 1000.
    Returns: (T, D), float64, on the CPU.
    """
    embedding: Any = denoiser.get_submodule(port.rpartition(".")[0])
    first: Any
    if isinstance(embedding, nn.Sequential):  # one that makes its frequencies itself
        embedder = denoiser.get_submodule(port.rpartition(".")[0].rpartition(".")[0])
        frequencies = embedder.timestep_embedding(timesteps.float(), embedder.frequency_embedding_size)
        first, act = embedding[0], embedding[1]
    else:
        first, act = embedding.linear_1, embedding.act
        frequencies = _projection(denoiser, port)(timesteps.float())
    weight = first.weight.double().cpu()
    bias = None if first.bias is None else first.bias.double().cpu()
    made: Tensor = act(nn.functional.linear(frequencies.double().cpu(), weight, bias))
    return made


def all_timesteps(per_step: int) -> Tensor:
    """Timesteps from 0 to 1000, so many for each step."""
    return torch.arange(int(_LAST) * per_step + 1) / per_step


def _projection(denoiser: Any, port: str) -> Any:
    """What makes frequencies of the timestep, beside or above what embeds them."""
    path = port
    while path:
        path = path.rpartition(".")[0]
        found = getattr(denoiser.get_submodule(path), "time_proj", None)
        if found is not None:
            return found
    raise AssertionError(f"nothing embeds time above {port}")
