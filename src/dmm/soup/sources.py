"""Tensors of models as they are read, in slices: from a file, or made of what files keep in another form."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dmm.formats.lora import LoraChange
from dmm.formats.transformer_files import Span
from dmm.soup.reading import WeightFile


class Source(Protocol):
    """Where one tensor of a model is read from."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In the layout that it is read for."""

    @property
    def dtype(self) -> torch.dtype:
        """In the file."""

    @property
    def num_elements(self) -> int:
        """How many."""

    @property
    def path(self) -> Path:
        """Of the file."""

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some elements, flattened."""


@dataclass(frozen=True)
class Kept:
    """A tensor of a file, or a stretch of one.

    Attributes:
        name: in the file.
        first: of the file's elements, the one that it begins with.
    """

    file: WeightFile
    name: str
    shape: tuple[int, ...]
    first: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """In the file."""
        return self.file.tensors[self.name].dtype

    @property
    def num_elements(self) -> int:
        """How many."""
        return torch.Size(self.shape).numel()

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.file.path

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some elements, flattened."""
        return self.file.read(self.name, self.first + start, self.first + stop, dtype)


@dataclass(frozen=True)
class Joined:
    """Tensors in a row, along their first axis."""

    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all together."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """That holds every part."""
        return reduce(torch.promote_types, (part.dtype for part in self.parts))

    @property
    def num_elements(self) -> int:
        """How many."""
        return sum(part.num_elements for part in self.parts)

    @property
    def path(self) -> Path:
        """Of the first part's file."""
        return self.parts[0].path

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some elements, flattened."""
        found, first = [], 0
        for part in self.parts:
            last = first + part.num_elements
            if start < last and first < stop:
                found.append(part.read(max(start, first) - first, min(stop, last) - first, dtype))
            first = last
        return torch.cat(found) if len(found) != 1 else found[0]


@dataclass(frozen=True)
class _Made:
    """A tensor that is made of one other.

    Attributes:
        kept: the other, as the model's own class has it.
    """

    kept: Source

    @property
    def dtype(self) -> torch.dtype:
        """In the file."""
        return self.kept.dtype

    @property
    def num_elements(self) -> int:
        """How many."""
        return self.kept.num_elements

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.kept.path


@dataclass(frozen=True)
class Turned(_Made):
    """A matrix, transposed. It is read whole for every slice: those that layouts turn are small."""

    @property
    def shape(self) -> tuple[int, ...]:
        """After it is turned."""
        return self.kept.shape[::-1]

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some elements, flattened."""
        return _whole(self.kept, dtype).T.flatten()[start:stop]


@dataclass(frozen=True)
class Change:
    """A LoRA's change of some rows of a weight or a bias.

    Attributes:
        scale: how strongly.
        spans: where the rows that it changes lie; None of one that changes them all.
    """

    lora: LoraChange
    scale: float
    spans: tuple[Span, ...] | None = None

    def put_on(self, weight: Tensor) -> Tensor:
        """A whole weight with the change on it."""
        if self.spans is None:
            return self.lora.changed(weight, self.scale)
        own = sorted(self.spans, key=lambda span: span.first)
        rows = torch.cat([torch.arange(span.at, span.at + span.count) for span in own])
        return weight.index_copy(0, rows, self.lora.changed(weight[rows], self.scale))

    def add_to(self, values: Tensor, start: int) -> None:
        """Add the change, one without a magnitude, to a slice of the weight, flattened, in place.

        A slice of a LoRA's product is computed from the rows that it takes.

        Args:
            start: the slice's first element.
        """
        columns = self.lora.form.num_columns
        for at, first, count in self._spans():
            begin, end = max(at * columns, start), min((at + count) * columns, start + len(values))
            if begin >= end:
                continue
            part = values[begin - start : end - start]
            low, high = -(-begin // columns), end // columns  # the whole rows among these
            if low >= high:
                self._add_cut(part, first - at, begin)
                continue
            head, tail = low * columns - begin, high * columns - begin
            self.lora.add_to(part[head:tail].view(high - low, columns), first - at + low, self.scale)
            self._add_cut(part[:head], first - at, begin)
            self._add_cut(part[tail:], first - at, high * columns)

    def _add_cut(self, values: Tensor, offset: int, start: int) -> None:
        """Add the change to a stretch of one or two rows that it has not all of."""
        columns = self.lora.form.num_columns
        if len(values):
            low, high = start // columns, -(-(start + len(values)) // columns)
            delta = self.lora.rows(offset + low, offset + high, values.dtype).flatten()
            values.add_(delta[start - low * columns :][: len(values)], alpha=self.scale)

    def _spans(self) -> list[tuple[int, int, int]]:
        if self.spans is None:
            return [(0, 0, self.lora.form.num_rows)]
        return [(span.at, span.first, span.count) for span in self.spans]


@dataclass(frozen=True)
class Changed(_Made):
    """A layer's weight or bias with LoRAs on it."""

    changes: tuple[Change, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of what is changed."""
        return self.kept.shape

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some elements, flattened."""
        if any(change.lora.magnitude is not None for change in self.changes):
            # a magnitude is of whole rows and columns
            weight = _whole(self.kept, dtype)
            for change in self.changes:
                weight = change.put_on(weight)
            return weight.flatten()[start:stop]
        values = self.kept.read(start, stop, dtype)
        for change in self.changes:
            change.add_to(values, start)
        return values


def split(source: Source, count: int) -> Sequence[Source]:
    """The parts of one length that lie in a row in a tensor.

    Raises: ValueError: it cannot be cut so.
    """
    if isinstance(source, Joined) and len(source.parts) == count:
        return source.parts
    if not isinstance(source, Kept) or not source.shape or source.shape[0] % count:
        raise ValueError
    shape = (source.shape[0] // count, *source.shape[1:])
    length = torch.Size(shape).numel()
    return [Kept(source.file, source.name, shape, source.first + i * length) for i in range(count)]


def _whole(source: Source, dtype: torch.dtype) -> Tensor:
    return source.read(0, source.num_elements, dtype).reshape(source.shape)
