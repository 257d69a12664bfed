"""Small truths about files."""

import hashlib
from pathlib import Path


def sha256(*paths: Path) -> str:
    """Hex digest of the files' bytes, one file after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
