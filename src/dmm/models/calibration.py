"""What a model's layers meet on noised samples, by which differences are decomposed: :mod:`dmm.maths.low_rank`.

A sample passes the teacher forward, and a random direction of its output backward. At each layer two covariances are
added up, on the layer's smaller side: of what the difference D makes of the inputs, D x, and of the gradients, g,
where there are fewer outputs; or else of the inputs, x, and of D^T g. Layers come in passes, as many at a time as a
bound of memory allows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmm.families import ask
from dmm.maths.low_rank import Components, input_components, output_components

MAX_POSITIONS = 1024
"""Of a sample that a layer is looked at in, evenly spaced: more tell little more, and cost time."""
MAX_BYTES = 2 * 2**30
"""Of covariances that are held at a time."""


@dataclass(frozen=True)
class Noised:
    """B noised samples, as a teacher reads them.

    Attributes:
        x_t: (B, C, H, W).
        timesteps: (B,).
        conditioning: what the model reads, by flat names.
    """

    x_t: Tensor
    timesteps: Tensor
    conditioning: Mapping[str, Tensor]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that take low-rank changes, by the name of their weight."""
    return {f"{name}.weight": module for name, module in model.named_modules() if takes_low_rank(module)}


def takes_low_rank(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution of one group."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def calibrated_components(
    teacher: nn.Module,
    differences: Callable[[str], Tensor],
    batches: Callable[[], Iterable[Noised]],
    *,
    seed: int,
    max_bytes: int = MAX_BYTES,
) -> Iterator[tuple[str, Components]]:
    """The components of every layer's difference, by the name of its weight; layers that do not differ are left out.

    Args:
        teacher: frozen, whose layers' inputs and gradients count.
        differences: of a weight, teacher minus start, by its name; in the weight's shape.
        batches: gives the same samples anew for each pass.
        seed: of the directions of the output.
        max_bytes: of covariances that are held at a time.
    """
    layers = {name: layer for name, layer in layers_of(teacher).items() if differences(name).any()}
    for names in _passes(layers, max_bytes):
        observers = {name: Observer(layers[name], differences(name)) for name in names}
        observe(teacher, list(observers.values()), batches(), seed)
        for name in names:
            yield name, observers.pop(name).components()


def _passes(layers: Mapping[str, nn.Module], max_bytes: int) -> list[list[str]]:
    passes: list[list[str]] = []
    held = max_bytes
    for name, layer in layers.items():
        # two float32 covariances, and the difference itself
        rows, columns = sides(layer)
        num_bytes = 4 * (2 * min(rows, columns) ** 2 + rows * columns)
        if held + num_bytes > max_bytes and (held or not passes):
            passes.append([])
            held = 0
        passes[-1].append(name)
        held += num_bytes
    return passes


def sides(layer: Any) -> tuple[int, int]:
    """How many outputs a layer has, and how many inputs it sums."""
    return layer.weight.shape[0], layer.weight[0].numel()


def observe(teacher: nn.Module, observers: Sequence["Observer"], batches: Iterable[Noised], seed: int) -> None:
    """Let observers add up what samples make of their layers, forward and backward.

    Args:
        teacher: frozen; its layers are the observers'.
        seed: of the directions of the output.
    """
    generator = torch.Generator().manual_seed(seed)
    hooks = [observer.layer.register_forward_hook(observer.see) for observer in observers]
    try:
        for batch in batches:
            for observer in observers:
                observer.num_samples += len(batch.x_t)
            with torch.enable_grad():
                # frozen weights ask for no gradient; the inputs carry it to every layer
                output = ask(teacher, batch.x_t.detach().requires_grad_(), batch.timesteps, batch.conditioning)
                direction = torch.randn(output.shape, generator=generator).to(output)
                # Tensor.backward would leave a function mode, such as a plan's
                torch.autograd.backward([(output * direction).sum()])
    finally:
        for hook in hooks:
            hook.remove()


class Observer:
    """Adds up a layer's two covariances, on its smaller side.

    Args:
        layer: of a frozen teacher.
        difference: of its weight, teacher minus start, in the weight's shape.
    """

    def __init__(self, layer: nn.Module, difference: Tensor) -> None:
        self.layer = layer
        self.num_samples = 0
        self._difference = difference
        self._by_output = difference.shape[0] <= difference[0].numel()
        side = min(difference.shape[0], difference[0].numel())
        weight: Any = layer.weight
        # what the difference makes of inputs, or the inputs; and gradients, or what it makes of these
        self._forward = torch.zeros(side, side, device=weight.device)
        self._backward = torch.zeros(side, side, device=weight.device)
        self._size = torch.zeros((), device=weight.device)
        self._num_seen, self._num_positions = 0, 0

    def see(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """As a forward hook: add up what comes by, and ask for the gradient."""
        with torch.no_grad(), _without_autocast(output.device):
            seen, num_positions = self._look_at_inputs(inputs[0].detach())
            self._forward.addmm_(seen.T, seen)
            self._num_seen += len(seen)
            self._num_positions += num_positions
        if not output.requires_grad:  # nothing before it depends on what carries gradients
            output.requires_grad_()
        output.register_hook(self._see_gradient)

    def _look_at_inputs(self, x: Tensor) -> tuple[Tensor, int]:
        """Rows of D x, or of x, and how many there were before they were thinned."""
        difference = self._difference.float()
        if isinstance(self.layer, nn.Linear):
            rows = x.flatten(0, -2)
            kept = rows[:: _step(len(rows), len(x))].float()
            return (kept @ difference.T if self._by_output else kept), len(rows)
        conv: Any = self.layer
        height, width = _size_after(conv, x)
        step = _side_step(height, width)
        stride = tuple(one * step for one in conv.stride)
        if self._by_output:
            found = F.conv2d(x.float(), difference, None, stride, conv.padding, conv.dilation)
            rows = found.permute(0, 2, 3, 1).flatten(0, 2)
        else:
            patches = F.unfold(x.float(), conv.kernel_size, conv.dilation, conv.padding, stride)
            rows = patches.transpose(1, 2).flatten(0, 1)
        return rows, len(x) * height * width

    @torch.no_grad()
    def _see_gradient(self, gradient: Tensor) -> None:
        if isinstance(self.layer, nn.Linear):
            rows = gradient.flatten(0, -2)
            rows = rows[:: _step(len(rows), len(gradient))]
        else:
            step = _side_step(*gradient.shape[2:])
            rows = gradient[:, :, ::step, ::step].permute(0, 2, 3, 1).flatten(0, 2)
        # a hook runs in whatever precision the pass that calls it does
        with _without_autocast(gradient.device):
            rows = rows.float()
            self._size += rows.square().mean() * len(rows)
            if not self._by_output:
                rows = rows @ self._difference.float().flatten(1)
            self._backward.addmm_(rows.T, rows)

    def components(self) -> Components:
        """Of the difference."""
        forward, backward = (one.double().cpu() / max(self._num_seen, 1) for one in (self._forward, self._backward))
        difference = self._difference.flatten(1).cpu()
        positions = self._num_positions / max(self.num_samples, 1)
        if self._by_output:
            return output_components(difference, forward * positions, backward)
        # as the gradients' covariance is damped on the other side, before the difference goes through it
        size = 0.05 * float(self._size) / max(self._num_seen, 1)
        backward = backward + size * (difference.double().T @ difference.double())
        return input_components(difference, forward, backward * positions, damping=1e-3)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Each operation in its tensors' own precision; the meta device, on which plans are made, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _step(num_rows: int, num_samples: int) -> int:
    return max(1, num_rows // num_samples // MAX_POSITIONS)


def _side_step(height: int, width: int) -> int:
    step = 1
    while -(-height // step) * -(-width // step) > MAX_POSITIONS:
        step += 1
    return step


def _size_after(conv: Any, x: Tensor) -> tuple[int, int]:
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, padding, dilation, kernel, stride in zip(
            x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]
    return sizes[0], sizes[1]
