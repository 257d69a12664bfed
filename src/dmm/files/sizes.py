"""Sizes in bytes, in words."""


def told_bytes(num_bytes: float) -> str:
    """A size, for people: 9.58 MB, 10.3 GB."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
