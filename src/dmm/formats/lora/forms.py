"""What a LoRA, or one of its relatives, adds to a layer's weight; pure.

A form is a change D of a weight, (out, in ...), that is kept as less than D:

    low rank    up @ down, or with a core between them (Tucker's)     kohya, PEFT, diffusers, LoCon
    Hadamard    (a1 @ b1) * (a2 @ b2)                                 LoHa (arXiv:2108.06098)
    Kronecker   w1 (x) w2, each perhaps a product of its own          LoKr (arXiv:2309.14859)
    whole       D itself                                              differences, norms, biases

Each gives the rows of D that it is asked for, so that large weights can be merged in slices.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """A change of a weight with ``num_rows`` outputs of ``num_columns`` numbers each."""

    @property
    def num_rows(self) -> int:
        """Outputs."""

    @property
    def num_columns(self) -> int:
        """Of each output, all that the weight has: inputs times the kernel's size."""

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None where alpha says nothing."""

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some outputs of the change, (last - first, num_columns)."""


@dataclass(frozen=True)
class LowRank:
    """up @ down; with a core, sum over p and q of up[:, p] core[p, q] down[q].

    Attributes:
        down: (rank, in, ...).
        up: (out, rank, ...).
        core: (rank, rank, height, width) of a convolution whose down and up are 1 x 1; or None.
    """

    down: Tensor
    up: Tensor
    core: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Outputs."""
        return len(self.up)

    @property
    def num_columns(self) -> int:
        """Of each output."""
        return self._right.shape[1]

    @property
    def rank(self) -> int:
        """How many products are summed."""
        return len(self.down)

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some outputs of the change."""
        return self.up.flatten(1)[first:last].to(dtype) @ self._right.to(dtype)

    def add_to(self, rows: Tensor, first: int, strength: float) -> None:
        """Add some outputs of the change, in place and in one pass.

        Args:
            rows: (count, columns), of which ``first`` is the first's place among the outputs.
        """
        up = self.up.flatten(1)[first : first + len(rows)]
        rows.addmm_(up.to(rows.dtype), self._right.to(rows.dtype), alpha=strength)

    @cached_property
    def _right(self) -> Tensor:
        if self.core is None:
            return self.down.flatten(1)
        return torch.einsum("pqhw,qi->pihw", self.core.float(), self.down.flatten(1).float()).flatten(1)


@dataclass(frozen=True)
class Hadamard:
    """The product, number by number, of two low-rank changes."""

    one: LowRank
    other: LowRank

    @property
    def num_rows(self) -> int:
        """Outputs."""
        return self.one.num_rows

    @property
    def num_columns(self) -> int:
        """Of each output."""
        return self.one.num_columns

    @property
    def rank(self) -> int:
        """Of each of the two."""
        return self.one.rank

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some outputs of the change."""
        return self.one.rows(first, last, dtype) * self.other.rows(first, last, dtype)


@dataclass(frozen=True)
class Kronecker:
    """The Kronecker product of a matrix with a matrix or a convolution's weight.

    Attributes:
        one: (a, b).
        other: (c, d, ...); the change is (a c, b d, ...).
        rank: of whichever of the two is kept as a product; None where neither is.
    """

    one: Tensor
    other: Tensor
    rank: int | None

    @property
    def num_rows(self) -> int:
        """Outputs."""
        return len(self.one) * len(self.other)

    @property
    def num_columns(self) -> int:
        """Of each output."""
        return self.one.shape[1] * self.other[0].numel()

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some outputs of the change."""
        places = torch.arange(first, last)
        left = self.one[places // len(self.other)].to(dtype)
        right = self.other.flatten(1)[places % len(self.other)].to(dtype)
        return (left[:, :, None] * right[:, None, :]).flatten(1)


@dataclass(frozen=True)
class Whole:
    """The change itself.

    Attributes:
        change: of the parameter's shape.
    """

    change: Tensor
    rank: int | None = None

    @property
    def num_rows(self) -> int:
        """Outputs."""
        return len(self.change)

    @property
    def num_columns(self) -> int:
        """Of each output."""
        return self.change[0].numel()

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some outputs of the change."""
        return self.change.reshape(len(self.change), -1)[first:last].to(dtype)


@dataclass(frozen=True)
class LoraChange:
    """What a file changes of one parameter of a model.

    Attributes:
        component: of the pipeline, such as ``unet`` or ``text_encoder``.
        module: the layer's path within it.
        parameter: ``weight`` or ``bias``.
        scaling: what the form is multiplied with: alpha / rank.
        magnitude: of DoRA (arXiv:2402.09353): the norms that the changed weight has, of each output, (out,), or of
            each input, (1, in, ...); None for what is no DoRA.
    """

    component: str
    module: str
    parameter: str
    form: Form
    scaling: float = 1.0
    magnitude: Tensor | None = None

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some outputs of what is added, of a change without a magnitude; (last - first, columns)."""
        return self.form.rows(first, last, dtype) * self.scaling

    def add_to(self, rows: Tensor, first: int, strength: float) -> None:
        """Add some outputs of a change without a magnitude to (count, columns) of the weight, in place."""
        if isinstance(self.form, LowRank):
            self.form.add_to(rows, first, strength * self.scaling)
        else:
            rows.add_(self.rows(first, first + len(rows), rows.dtype), alpha=strength)

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        """The parameter with the change on it, in the dtype that it is given in.

        A DoRA at a strength s is W + s (W' - W), W' being what it makes of W.
        """
        added = self.rows(0, len(weight), weight.dtype).reshape(weight.shape).to(weight.device)
        if self.magnitude is None:
            return weight + strength * added
        new = weight + added
        magnitude = self.magnitude.to(new)
        by_output = magnitude.shape[0] == len(weight)
        norms = new.flatten(1).norm(dim=1) if by_output else new.transpose(0, 1).flatten(1).norm(dim=1)
        shape = (-1, *(1,) * (new.ndim - 1)) if by_output else (1, -1, *(1,) * (new.ndim - 2))
        # a row of zeros stays one
        factors = magnitude.reshape(shape) / norms.clamp(min=torch.finfo(new.dtype).tiny).reshape(shape)
        return weight + strength * (new * factors - weight)
