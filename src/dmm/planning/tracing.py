"""Running a model without its numbers: on the meta device, where tensors have shapes and no contents.

Every operation is seen as it passes, and with it what it allocates and what is freed again, so that the most memory
that was ever taken is known without taking any. Autocast knows no meta device, and is imitated.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten: Any = torch.ops.aten


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}

# what autocast computes in half precision, and what a GPU's computes in float32
_HALF = {
    *(F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm),
}
_FULL = {F.group_norm, F.layer_norm, F.softmax, F.cross_entropy, torch.group_norm, torch.layer_norm, Tensor.softmax}


class Meter(TorchDispatchMode):
    """Counts what operations within the block take: bytes of what they make, as that comes and goes, and FLOPs.

    Attributes:
        now: bytes of those tensors that are alive.
        peak: the most that they ever were.
        flops: of matrix products, convolutions and attention; a multiplication and an addition are two.
        num_operations: that a device would be given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = self.num_operations = 0
        self._held: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and see what it has made."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self.num_operations += not func.is_view
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=made)
        given = {id(one.untyped_storage()) for one in _tensors((*args, *kwargs.values()))}
        for one in _tensors(made if isinstance(made, list | tuple) else [made]):
            if id(one.untyped_storage()) not in given:
                self._hold(one.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._held:
            return
        self._held[key] = (weakref.ref(storage, lambda _: self._let_go(key)), storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _let_go(self, key: int) -> None:
        self.now -= self._held.pop(key)[1]


class Imitated(TorchFunctionMode):
    """Within the block, operations choose their precision as under autocast, and attention is the fused one.

    Args:
        half: in which precision what may be is computed; None: each in its own, without autocast.
        on_gpu: norms are then computed in float32.
    """

    def __init__(self, half: torch.dtype | None, *, on_gpu: bool) -> None:
        super().__init__()
        self._half, self._on_gpu = half, on_gpu

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function in the precision that autocast gives it."""
        kwargs = kwargs or {}
        dtype = None
        if func is F.scaled_dot_product_attention:
            func, dtype = _fused_attention, self._half
        elif func in _HALF:
            dtype = self._half
        elif func in _FULL and self._on_gpu and self._half is not None:
            dtype = torch.float32
        if dtype is not None:
            args = tuple(_cast(one, dtype) for one in args)
            kwargs = {name: _cast(one, dtype) for name, one in kwargs.items()}
        return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operation's values, which may be lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, Tensor))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What keeps no matrix of attention, as devices compute it; the meta device would by itself take the plain form."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    attend: Any = _aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output


def checkpointing(half: torch.dtype | None, *, on_gpu: bool) -> Callable[..., Any]:
    """What a model that computes activations twice is given to do so: the second time is imitated, too.

    Args:
        half, on_gpu: see :class:`Imitated`, which is not in force where a backward pass computes anew.
    """
    return partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), Imitated(half, on_gpu=on_gpu)))
