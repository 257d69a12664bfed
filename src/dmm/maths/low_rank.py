"""A layer's difference as low-rank components, the ones that move a model's output most first; pure.

Let D (out, in) be the difference of a layer's weight, C = E[x x^T] of the layer's inputs and G = E[g g^T] of the
gradients of the model's output at the layer's. To second order, with inputs and gradients taken for independent, to
have the product B A in place of D moves the model's output by

    || G^1/2 (D - B A) C^1/2 ||_F^2                                                  (1)

whose best B A of every rank is a truncated singular value decomposition of G^1/2 D C^1/2: its left vectors are the
eigenvectors of G^1/2 (D C D^T) G^1/2. A plain decomposition of D, which is how LoRAs are extracted everywhere, is the
case where C and G say nothing. As a root of a matrix, Cholesky's factor serves as well as the symmetric one: the norm
and with it B A are the same.

A decomposition takes the layer's smaller side only: D C D^T, (out, out), where there are fewer outputs, or else
D^T G D, (in, in).

Source of the independence: K-FAC (Martens and Grosse 2015, arXiv:1503.05671).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.05
"""By default, the share of its mean diagonal that is added to a covariance: a few samples do not fill a layer."""


@dataclass(frozen=True)
class Components:
    """A difference D as a sum of R products up[:, i] down[i], by what they are worth.

    Attributes:
        gains: (R,) float64, decreasing: by how much each lowers (1), the expected squared move of the output.
        up: (out, R), float32.
        down: (R, in), float32. Each has its ``up``'s norm.
    """

    gains: Tensor
    up: Tensor
    down: Tensor

    def cut(self, rank: int) -> "Components":
        """The first ones."""
        return Components(self.gains[:rank], self.up[:, :rank], self.down[:rank])


def output_components(
    difference: Tensor, moves: Tensor, sensitivity: Tensor, *, damping: float = DAMPING
) -> Components:
    """The components of a difference, found on the side of its outputs.

    Args:
        difference: D, (out, in).
        moves: D C D^T = E[(D x) (D x)^T], (out, out), summed over a sample's positions.
        sensitivity: G = E[g g^T], (out, out), a mean over positions.
        damping: see :data:`DAMPING`; of ``sensitivity``.
    """
    root = _root(sensitivity.double(), damping)
    gains, vectors = _eigen(root.T @ moves.double() @ root, min(difference.shape))
    up = torch.linalg.solve_triangular(root.T, vectors, upper=True)
    down = vectors.T @ root.T @ difference.double()
    return _balanced(gains, up, down)


def input_components(difference: Tensor, inputs: Tensor, pulls: Tensor, *, damping: float = DAMPING) -> Components:
    """The components of a difference, found on the side of its inputs.

    Args:
        difference: D, (out, in).
        inputs: C = E[x x^T], (in, in), a mean over positions.
        pulls: D^T G D = E[(D^T g) (D^T g)^T], (in, in), summed over a sample's positions.
        damping: see :data:`DAMPING`; of ``inputs``.
    """
    root = _root(inputs.double(), damping)
    gains, vectors = _eigen(root.T @ pulls.double() @ root, min(difference.shape))
    up = difference.double() @ root @ vectors
    down = torch.linalg.solve_triangular(root.T, vectors, upper=True).T
    return _balanced(gains, up, down)


def plain_components(difference: Tensor) -> Components:
    """The components of a difference where nothing is known of inputs and outputs: its singular vectors.

    Source: Eckart and Young 1936, https://doi.org/10.1007/BF02288367.
    """
    matrix = difference.double()
    if matrix.shape[0] <= matrix.shape[1]:
        gains, vectors = _eigen(matrix @ matrix.T, min(matrix.shape))
        return _balanced(gains, vectors, vectors.T @ matrix)
    gains, vectors = _eigen(matrix.T @ matrix, min(matrix.shape))
    return _balanced(gains, matrix @ vectors, vectors.T)


def deal_ranks(gains: Sequence[Mapping[str, Tensor]], costs: Mapping[str, int], budget: int) -> list[dict[str, int]]:
    """Deal a number of parameters out to the layers of several styles, the best bargains first.

    A gain counts as its share of all that its style has to gain, so that every style's relative error weighs alike.

    Args:
        gains: by style, each layer's, as :class:`Components` has them.
        costs: parameters that one rank of each layer takes: out + in.
        budget: parameters, of all styles together.
    Returns: by style, the rank of each layer; layers without one are left out.
    """
    owners = [(style, layer) for style, layers in enumerate(gains) for layer in layers]
    totals = [sum(float(of_layer.sum()) for of_layer in layers.values()) or 1.0 for layers in gains]
    worth = [gains[style][layer] / totals[style] / costs[layer] for style, layer in owners]
    counts = torch.tensor([len(of_layer) for of_layer in worth])
    if not counts.sum():
        return [{} for _ in gains]
    index = torch.repeat_interleave(torch.arange(len(owners)), counts)
    every = torch.cat(worth)
    # stable, so that a layer's own order, and that of layers that are worth the same, stays
    order = torch.sort(every, descending=True, stable=True).indices
    order = order[every[order] > 0]
    spent = torch.tensor([costs[layer] for _, layer in owners])[index[order]].cumsum(0)
    taken = index[order[: int((spent <= budget).sum())]]
    ranks: list[dict[str, int]] = [{} for _ in gains]
    for (style, layer), rank in zip(owners, torch.bincount(taken, minlength=len(owners)).tolist(), strict=True):
        if rank:
            ranks[style][layer] = rank
    return ranks


def _root(covariance: Tensor, damping: float) -> Tensor:
    """L with L L^T the damped covariance, (n, n); the identity where nothing came by."""
    size = covariance.diagonal().mean()
    if size <= 0:
        return torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.linalg.cholesky(covariance + damping * size * torch.eye(len(covariance), dtype=covariance.dtype))


def _eigen(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, at least 0, in decreasing order, and their vectors (n, count)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]


def _balanced(gains: Tensor, up: Tensor, down: Tensor) -> Components:
    # what vanishes under rounding must not be divided by
    scale = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-12)
    return Components(gains, (up * scale).float(), (down / scale[:, None]).float())
