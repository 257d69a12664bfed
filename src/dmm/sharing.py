"""Who supervises what: which samples of the global batch each process trains on, and under which teacher.

The paper gives each GPU one teacher. Here, with W processes and N teachers and G = min(W, N), process
j serves the teachers {i : i mod G = j mod G}: one teacher a process where W >= N, all N where W = 1
(DMM §3.3, Fig. 2a, Algorithm 1 line 2).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Some samples that one process trains on under one teacher.

    Attributes:
        teacher: its index.
        indices: of the samples in the global batch.
        weight: of each sample's loss, such that over all processes each teacher's weights sum to 1/N.
    """

    teacher: int
    indices: range
    weight: float


def share_batch(batch_size: int, num_teachers: int, num_processes: int, process: int) -> list[Group]:
    """The groups of one process.

    The global batch is ordered by teacher, and each teacher's part, all of one size or a sample apart,
    is dealt to the processes that serve it, likewise.

    Args:
        batch_size: of the global batch; at least one sample for every teacher and process that serves it.
        process: its index, in [0, num_processes).
    Raises: ValueError: the batch is too small to give every process a sample of each teacher that it serves.
    """
    stride = min(num_processes, num_teachers)
    groups, start = [], 0
    for teacher in range(num_teachers):
        size = batch_size // num_teachers + (teacher < batch_size % num_teachers)
        serving = [j for j in range(num_processes) if j % stride == teacher % stride]
        if size < len(serving):
            raise ValueError(
                f"A batch of {batch_size} gives teacher {teacher} {size} samples for the {len(serving)} processes that "
                f"serve it; the smallest batch is {num_teachers * -(-num_processes // stride)}."
            )
        if process in serving:
            place = serving.index(process)
            first = start + size * place // len(serving)
            last = start + size * (place + 1) // len(serving)
            groups.append(Group(teacher, range(first, last), 1 / (num_teachers * size)))
        start += size
    return groups


def is_uneven(num_teachers: int, num_processes: int) -> bool:
    """Whether some processes serve more than others: W is no multiple of N, nor N of W."""
    return max(num_teachers, num_processes) % min(num_teachers, num_processes) != 0
