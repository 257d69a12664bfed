"""Adapters that nobody trained, large enough to be seen."""

import torch

from dmm.models.adapters import Adapter, Factors
from dmm.models.calibration import layers_of


def some_adapter(model, seed, rank=2):
    """An adapter that changes every parameter of a model."""
    generator = torch.Generator().manual_seed(seed)
    layers, factors, offsets = layers_of(model), {}, {}
    for name, parameter in model.named_parameters():
        if name in layers:
            up = 0.1 * torch.randn(len(parameter), rank, generator=generator)
            down = torch.randn(rank, *parameter.shape[1:], generator=generator) / parameter[0].numel() ** 0.5
            factors[name] = Factors(up, down)
        else:
            offsets[name] = 0.1 * torch.randn(parameter.shape, generator=generator)
    return Adapter(factors, offsets)
