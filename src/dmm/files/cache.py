"""The user's cache: where what can be made again is kept between commands."""

import os
from pathlib import Path

import platformdirs

from dmm.errors import UserError


def cache_folder(name: str) -> Path:
    """A folder of the user's cache, to write to; it need not be there yet.

    Raises: UserError: it cannot be written; with how another place is named.
    """
    folder = platformdirs.user_cache_path("dmm") / name
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"The cache '{folder}' cannot be written. Set XDG_CACHE_HOME to a folder that can, or make '{place}' one."
        )
    return folder
