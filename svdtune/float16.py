"""Products of several factors in float16, which ends at 65504.

A base layer sums in float32, so it is finite where its outputs are. Between two factors coordinates are stored: they
are as large as a row is long, which may be far longer than its largest entry, and are multiplied by singular values.
So rows that are too long are divided by a power of two first, and what they give is multiplied by it at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The range ends at 2^16, and roundings add up.
SAFE_EXPONENT = 14


def divisor_of_rows(rows: Tensor, *values: Tensor) -> Tensor | None:
    """Powers of two to divide rows in float16 by, so that products with them and ``values`` stay in range; mostly one.

    Shapes: rows (..., n), values (r,), or (B, r) for rows (B, ..., n); returns (..., 1), or None in other dtypes.
    """
    if rows.dtype is not torch.float16:
        return None
    with torch.no_grad():
        largest = _largest(values, rows.ndim - 1)
        return _divisor(torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32) * largest)


def divisor_of_images(x: Tensor, values: Tensor, count: int, dimensions: int) -> Tensor | None:
    """As `divisor_of_rows`, for images, each of which is divided as a whole, since a convolution mixes its pixels.

    Shapes, in two dimensions: x (B, C, H, W) or (C, H, W), values (r,) or (B, r); returns (B, 1, 1, 1) or (1, 1, 1).
    ``count`` is how many entries of x make one product.
    """
    if x.dtype is not torch.float16:
        return None
    with torch.no_grad():
        every = tuple(range(-dimensions - 1, 0))
        largest = _largest((values,), len(every))
        return _divisor(x.float().abs().amax(every, keepdim=True) * count**0.5 * largest)


def divisor_of_sums(a: Tensor, b: Tensor) -> Tensor | None:
    """A power of two to divide ``b`` by, so that aᵀ b and products of it with vectors stay in float16's range.

    Shapes: a (N, m), b (N, n); returns (), or None in other dtypes.
    """
    if a.dtype is not torch.float16:
        return None
    with torch.no_grad():
        lengths = torch.linalg.vector_norm(a, dtype=torch.float32) * torch.linalg.vector_norm(b, dtype=torch.float32)
        return _divisor(lengths)


class Divided(torch.autograd.Function):
    """x / divisor before a linear function whose result is `Multiplied`: the two cancel in the gradient of x, which
    would else leave float16's range on its way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, divisor: Tensor) -> Tensor:
        return x / divisor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        return grad_y, None


class Multiplied(Divided):
    """y * divisor; see `Divided`."""

    @staticmethod
    def forward(y: Tensor, divisor: Tensor) -> Tensor:
        return y * divisor


class ScaledProjections(torch.autograd.Function):
    """projections * values between `Divided` and `Multiplied`, with the whole gradient of the values."""

    generate_vmap_rule = True

    @staticmethod
    def forward(projections: Tensor, values: Tensor, divisor: Tensor) -> Tensor:
        return (projections * values).to(projections.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_products: Tensor) -> tuple[Tensor | None, ...]:
        projections, values, divisor = ctx.saved_tensors
        grad_projections = (grad_products * values).to(projections.dtype) if ctx.needs_input_grad[0] else None
        grad_values = None
        if ctx.needs_input_grad[1]:
            grad_values = (
                (grad_products.float() * projections * divisor.float()).sum_to_size(values.shape).to(values.dtype)
            )
        return grad_projections, grad_values, None


def _largest(values: tuple[Tensor, ...], dimensions: int) -> Tensor:
    """The largest of all values, or one; of each sample where there is a row for each, with that many dimensions."""
    all_values = torch.cat(values, -1) if len(values) > 1 else values[0]
    largest = all_values.abs().amax(-1).clamp(min=1).float()
    return largest.reshape(-1, *[1] * dimensions) if largest.ndim else largest


def _divisor(size: Tensor) -> Tensor:
    """The power of two, at most the largest one of float16, that brings ``size`` to `SAFE_EXPONENT` or below."""
    return (size.log2().ceil() - SAFE_EXPONENT).clamp(0, 15).exp2().to(torch.float16)
