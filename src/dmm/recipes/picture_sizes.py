"""Of what sizes the pictures are, and what models are told of that."""

from typing import Annotated

from dmm.recipes.parts import Count, Part, Whole, in_range

Pixels = Annotated[Whole, in_range(least=1, most=65_536)]
Offset = Annotated[Whole, in_range(least=0, most=65_536)]


class Framing(Part):
    """What student and teachers are told of the pictures' size, where their family reads it: by default that they
    never were larger than they are painted, which is what pipelines say where they are told nothing.
    """

    original: tuple[Pixels, Pixels] | None = None
    """Width and height before they were scaled; by default ``size``."""
    corner: tuple[Offset, Offset] = (0, 0)
    """What was cut off at the left and at the top."""
    target: tuple[Pixels, Pixels] | None = None
    """Width and height that are painted; by default ``size``."""


def check_size(size: int | None) -> int | None:
    """Pass a size of pictures on, if it is one that models have.

    Raises: ValueError: it is no multiple of 8.
    """
    if size is not None and size % 8:
        raise ValueError(f"found {size}, expected a multiple of 8; {size // 8 * 8} and {size // 8 * 8 + 8} are near")
    return size


class Buckets(Part):
    """Sizes of one area and many shapes, into which images are sorted, as kohya's scripts do it; none is stretched."""

    step: Annotated[Whole, in_range(least=1)] = 64
    """That all sides are multiples of, in pixels."""
    least: Count | None = None
    """The shortest side; by default half of ``size``."""
    most: Count | None = None
    """The longest side; by default twice ``size``."""
