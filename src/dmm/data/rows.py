"""Rows of named tensors, cached on disk in shards, each named by what it was made from.

A shard is made once, whoever asks for the same content: another run, another recipe, a set that shares
its beginning with this one. A run that is interrupted goes on behind the last shard that it wrote.
"""

import bisect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dmm.data.keys import digest_tensors
from dmm.files.outputs import new_file

# few enough that little is lost when a run is interrupted, enough that a million rows are no million files
SHARD_ROWS = 64
_CHECKSUM = "sha256"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A safetensors file of tensors that all begin with the same number of rows."""

    path: Path
    num_rows: int


@dataclass(frozen=True)
class Place:
    """A process's among those that share some work."""

    index: int = 0
    count: int = 1

    def rows(self, num_rows: int) -> int:
        """How many of ``num_rows`` rows it sees to."""
        starts = range(self.index * SHARD_ROWS, num_rows, self.count * SHARD_ROWS)
        return sum(min(SHARD_ROWS, num_rows - start) for start in starts)


ALONE = Place()


class Rows:
    """M rows of named tensors, read at random; what is not asked for stays on disk.

    Args:
        shards: in order; each holds the same names.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._starts = list(itertools.accumulate((shard.num_rows for shard in self.shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """The tensors of some rows.

        Args:
            rows: (B,) int64, in any order, repeated or not.
        Returns: name to (B, ...), float32, on the CPU.
        """
        asked: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(rows.tolist()):
            owner = bisect.bisect_right(self._starts, row) - 1
            asked.setdefault(owner, []).append((place, row - self._starts[owner]))
        found: dict[str, list[Tensor]] = {}
        for owner, pairs in asked.items():
            # opened anew each time, which is quick: a million rows are more files than may stay open
            with safe_open(self.shards[owner].path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                    stored = file.get_slice(name)
                    tensors = found.setdefault(name, [torch.empty(0)] * len(rows))
                    for place, row in pairs:
                        tensors[place] = stored[row : row + 1]
        # widened before they are put together: under autocast to bf16 a CPU puts no float16 together
        return {name: torch.cat([one.float() for one in tensors]) for name, tensors in found.items()}


def cached_rows(
    folder: Path,
    num_rows: int,
    key: Callable[[range], str],
    make: Callable[[range], dict[str, Tensor]],
    progress: Callable[[float], object],
    place: Place = ALONE,
) -> Rows:
    """Rows from the cache, made where it has none, or none that is whole.

    Args:
        folder: of the cache, for rows of this kind.
        key: names the content of some rows by what it is made from, without making it.
        make: makes the tensors of some rows, in the dtype that is to be stored. Reports its progress itself.
        progress: told the number of rows that the cache had.
        place: among processes that share the work: each sees to its own shards, and none may read any before all are
            done. By default there is one process.
    Raises: UserError: the cache cannot be written.
    """
    shards = []
    for index, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        rows = range(start, min(start + SHARD_ROWS, num_rows))
        shard = Shard(folder / f"{key(rows)}.safetensors", len(rows))
        if index % place.count != place.index:
            pass  # another process's
        elif _is_whole(shard):
            progress(len(rows))
        else:
            _write(shard, make(rows))
        shards.append(shard)
    return Rows(shards)


def _is_whole(shard: Shard) -> bool:
    if not shard.path.exists():
        return False
    try:
        with safe_open(shard.path, framework="pt") as file:
            recorded = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if recorded == digest_tensors(tensors) and all(len(tensor) == shard.num_rows for tensor in tensors.values()):
            return True
    except (OSError, SafetensorError):
        pass
    logger.warning("%s is damaged; it is made again.", shard.path)
    return False


def _write(shard: Shard, tensors: dict[str, Tensor]) -> None:
    assert all(len(tensor) == shard.num_rows for tensor in tensors.values())
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with new_file(shard.path, overwrite=True) as temporary:
        # one entry of metadata only: safetensors writes several in no fixed order, and equal content shall be equal
        # bytes; not save_file, which hides the system's error when the disk is full
        temporary.write_bytes(save(tensors, {_CHECKSUM: digest_tensors(tensors)}))
