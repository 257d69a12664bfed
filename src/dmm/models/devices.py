"""Where models run: a device by its name, and the way of tensors to it."""

import torch
from torch import Tensor

from dmm.errors import UserError


def find_device(name: str | None = None) -> torch.device:
    """A device of this machine.

    Args:
        name: ``cuda``, ``cuda:1``, ``mps`` or ``cpu``; by default the best there is.
    Raises: UserError: torch finds no such one here.
    """
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    device = torch.device(name or next(kind for kind, count in counts.items() if count))
    if (device.index or 0) >= counts[device.type]:
        raise UserError(
            f"--device {device}: torch finds {counts[device.type]} of '{device.type}' here; choose another, or cpu."
        )
    return device


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on a device, without waiting for what that is still computing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
