"""Where the teachers' weights are: all on the device where they fit, or there in turn, the next one on its way.

A batch's samples are ordered by teacher, so that over the micro-batches of a step every teacher has one
turn, in the order of their indices, and after the last comes the first again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dmm.training.distill import Teacher, Teachers

FOR_ACTIVATIONS = 0.25
"""Of a GPU's memory, left to them."""


def place_teachers(teachers: Mapping[int, Teacher], device: torch.device, *, num_student_bytes: int) -> Teachers:
    """Put the teachers that a process serves where they can be used.

    Args:
        teachers: by index, on the CPU.
        num_student_bytes: what the student will take of the device: weights, gradients, the optimizer's state.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        needed = sum(tensor.nbytes for teacher in teachers.values() for tensor in _tensors(teacher.denoiser))
        if needed > free - num_student_bytes - FOR_ACTIVATIONS * total:
            return TakingTurns(teachers, device)
    for teacher in teachers.values():
        teacher.denoiser.to(device)
    return dict(teachers)


class TakingTurns:
    """Teachers whose weights wait in pinned CPU memory; two are on the GPU, the one asked for and the next.

    The next one is copied on a stream of its own while the one asked for computes.

    Args:
        teachers: by index, in the order of their turns, on the CPU.
        device: a GPU.
    """

    def __init__(self, teachers: Mapping[int, Teacher], device: torch.device) -> None:
        self._teachers = dict(teachers)
        self._device = device
        self._copying = torch.cuda.Stream(device)
        self._waiting = {index: _pin(teacher.denoiser) for index, teacher in teachers.items()}
        self._here: dict[int, list[Tensor]] = {}

    def __getitem__(self, index: int) -> Teacher:
        """A teacher whose weights are on the GPU until another one but the next is asked for."""
        order = list(self._teachers)
        following = order[(order.index(index) + 1) % len(order)]
        for left in self._here.keys() - {index, following}:
            self._set(left, self._waiting[left])
            del self._here[left]
        self._copy(index)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copying)  # before the next one's copy is queued, which it need not wait for
        for tensor in self._here[index]:
            tensor.record_stream(computing)  # so that its memory is not used anew before it was read
        self._set(index, self._here[index])
        self._copy(following)
        return self._teachers[index]

    def _copy(self, index: int) -> None:
        if index not in self._here:
            with torch.cuda.stream(self._copying):
                self._here[index] = [tensor.to(self._device, non_blocking=True) for tensor in self._waiting[index]]

    def _set(self, index: int, tensors: list[Tensor]) -> None:
        for holder, tensor in zip(_tensors(self._teachers[index].denoiser), tensors, strict=True):
            holder.data = tensor


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _pin(module: nn.Module) -> list[Tensor]:
    pinned = [tensor.data.pin_memory() for tensor in _tensors(module)]
    for holder, tensor in zip(_tensors(module), pinned, strict=True):
        holder.data = tensor
    return pinned
