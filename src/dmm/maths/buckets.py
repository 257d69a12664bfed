"""Sizes of about one area and many shapes, into which pictures are sorted instead of being cut square.

As kohya's scripts do it, after NovelAI: a picture goes to the size whose shape is nearest to its own, is scaled until
it covers that, and what juts out is cut off. It is never stretched.
"""

from collections.abc import Sequence

Size = tuple[int, int]
"""Width and height in pixels."""


def bucket_sizes(side: int, *, step: int, least: int, most: int) -> list[Size]:
    """The sizes of at most the area of a square, narrow ones first; the square is among them where ``step`` divides it.

    Args:
        side: pixels of the square.
        step: that all sides are multiples of.
        least, most: the shortest and the longest side.
    """
    sizes = set()
    for width in range(-(-least // step) * step, most + 1, step):
        height = min(side * side // width // step * step, most // step * step)
        if height >= least:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest to a picture's: of that shape it keeps the most."""

    def kept(bucket: Size) -> float:
        ratio = (size[0] / size[1]) / (bucket[0] / bucket[1])
        return min(ratio, 1 / ratio)

    # of equal shapes the largest
    return max(buckets, key=lambda bucket: (kept(bucket), bucket[0] * bucket[1]))
