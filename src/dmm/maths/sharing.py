"""Who supervises what: which samples of the global batch each process trains on, and under which teacher.

The paper gives each GPU one teacher. Here, with W processes and N teachers and G = min(W, N), process
j serves the teachers {i : i mod G = j mod G}: one teacher a process where W >= N, all N where W = 1
(DMM §3.3, Fig. 2a, Algorithm 1 line 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Some samples that one process trains on under one teacher.

    Attributes:
        teacher: its index.
        indices: of the samples in the global batch.
        weight: of each sample's loss, such that over all processes each teacher's weights sum to its share.
    """

    teacher: int
    indices: range
    weight: float


def share_batch(batch_size: int, shares: Sequence[float], num_processes: int, process: int) -> list[Group]:
    """The groups of one process.

    The global batch is ordered by teacher, and each teacher's part, its share rounded to whole samples, is dealt to
    the processes that serve it, in parts of one size or a sample apart.

    Args:
        batch_size: of the global batch; at least one sample for every teacher and process that serves it.
        shares: of each of the N teachers, positive; they sum to 1.
        process: its index, in [0, num_processes).
    Raises: ValueError: the batch is too small to give every process a sample of each teacher that it serves.
    """
    num_teachers = len(shares)
    stride = min(num_processes, num_teachers)
    groups, start = [], 0
    for teacher, size in enumerate(_sizes(batch_size, shares)):
        serving = [j for j in range(num_processes) if j % stride == teacher % stride]
        if size < len(serving):
            raise ValueError(
                f"a batch of {batch_size} gives teacher {teacher} {size} samples for the {len(serving)} processes that "
                "serve it; every process needs one of each of its teachers"
            )
        if process in serving:
            place = serving.index(process)
            first = start + size * place // len(serving)
            last = start + size * (place + 1) // len(serving)
            groups.append(Group(teacher, range(first, last), shares[teacher] / size))
        start += size
    return groups


def _sizes(batch_size: int, shares: Sequence[float]) -> list[int]:
    """Whole samples for each share: rounded down, and what is left to those that lost most, the first before others."""
    exact = [batch_size * share for share in shares]
    sizes = [int(size + 1e-9) for size in exact]
    lost = sorted(range(len(shares)), key=lambda i: (-round(exact[i] - sizes[i], 9), i))
    for i in lost[: batch_size - sum(sizes)]:
        sizes[i] += 1
    return sizes


def is_uneven(num_teachers: int, num_processes: int) -> bool:
    """Whether some processes serve more than others: W is no multiple of N, nor N of W."""
    return max(num_teachers, num_processes) % min(num_teachers, num_processes) != 0
