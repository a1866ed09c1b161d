"""The weight of a tuned layer as other modules read it: W', computed when it is used.

Some modules pass a layer's weight to a function instead of calling the layer: Mamba's convolution, WavLM's attention,
a head that multiplies with an embedding. Others only ask for its dtype, but for every token. So they get a tensor that
has its shape and dtype at once, and computes its values when an operation needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def weight_to_read(delta: Tensor, compute: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """compute(delta), with its gradient.

    Args:
        delta: The change of the singular values, (g * rank,).
        compute: Computes W' from it.
        like: A tensor with the shape, dtype and device of W', such as W. It is not used where Python is traced
            (torch.compile, export, functorch): there the values are computed at once.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return compute(delta)
    return _Read.apply(delta, compute, like)


class WeightToRead(Tensor):
    """A tensor whose values are computed at the first operation that needs them."""

    _compute: Callable[[], Tensor]
    _computed: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, compute: Callable[[], Tensor]) -> WeightToRead:
        made = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        made._compute, made._computed = compute, None
        return made

    def __init__(self, like: Tensor, compute: Callable[[], Tensor]) -> None: ...

    def values_now(self) -> Tensor:
        if self._computed is None:
            with torch.no_grad():
                self._computed = self._compute()
        return self._computed

    def data_ptr(self) -> int:
        return self.values_now().data_ptr()

    def numpy(self, **kwargs: Any) -> Any:
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.values_now().numpy(**kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.values_now()!r})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.values_now().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values_now().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], cls):
            raise RuntimeError(
                f"{func} cannot change the weight of a layer that svdtune tunes: it is computed when it is read. "
                "Change `base_layer.weight`, or merge the adapter first."
            )
        computed = tree_map_only(cls, cls.values_now, (args, kwargs or {}))
        return func(*computed[0], **computed[1])


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, delta: Tensor, compute: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        ctx.save_for_backward(delta)
        ctx.compute = compute
        return WeightToRead(like, lambda: compute(delta))

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        (delta,), twice = ctx.saved_tensors, torch.is_grad_enabled()  # whether this is a double backward
        # W' is computed again: to keep its graph would keep a weight per read.
        with torch.enable_grad():
            delta = delta if twice else delta.detach().requires_grad_()
            weight = ctx.compute(delta)
        (grad_delta,) = torch.autograd.grad(weight, delta, grad_weight.to(weight.dtype), create_graph=twice)
        return grad_delta, None, None
