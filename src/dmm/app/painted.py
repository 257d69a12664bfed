"""What a painting leaves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Painted:
    """A picture as the bytes of a PNG that tells how it was made, and what stands under it."""

    png: bytes
    label: str
    file_name: str
