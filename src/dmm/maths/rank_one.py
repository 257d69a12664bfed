"""A constant as a change of weights: what is added to a layer's output, in a layer without a bias.

The last layer of what embeds time gives W h(t), where h depends on nothing but the timestep. If some u has u . h(t) = 1
at every timestep, then W + c u^T gives W h(t) + c: a constant c is a change of rank one. Such a u exists, to rounding,
where the layer is wide beside what h spans.
"""

import torch
from torch import Tensor

_RIDGE = 1e-9  # relative to the mean square of h: u stays short, and so small in half precision, at an error of 4e-6


def constant_direction(hidden: Tensor) -> Tensor:
    """The shortest u whose product with h is 1 at every timestep, as nearly as can be.

    Args:
        hidden: h, (T, D), float64.
    Returns: (D,), float64.
    """
    # by the smaller system of equations: h spans fewer dimensions than it has
    gram = hidden @ hidden.T
    ones = torch.ones(len(gram), dtype=hidden.dtype)
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=hidden.dtype)
    return hidden.T @ torch.linalg.solve(gram + ridge, ones)
