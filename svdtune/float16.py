"""Products of several factors in float16, whose largest number is 65504.

A base layer sums in float32, so it only overflows if its output does. A product of two factors also stores coordinates
in between. They can be as large as the norm of a row, far above its largest entry, and singular values multiply them.
So a row that is too large is divided by a power of two first, and its result is multiplied by it at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The range ends at 2^16. The margin is for rounding errors, which add up.
SAFE_EXPONENT = 14


def divisor_of_rows(rows: Tensor, *values: Tensor) -> Tensor | None:
    """The power of two to divide each row by, so that its products with vectors and ``values`` stay in range.

    It is one for rows of usual size. Shapes: rows (..., n), values (r,), or (B, r) for rows (B, ..., n); returns
    (..., 1), or None in other dtypes.
    """
    if rows.dtype is not torch.float16:
        return None
    with torch.no_grad():
        largest = _largest(values, rows.ndim - 1)
        return _divisor(torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32) * largest)


def divisor_of_images(x: Tensor, values: Tensor, count: int, dimensions: int) -> Tensor | None:
    """As `divisor_of_rows`, but one divisor per image, since a convolution mixes its pixels.

    ``count`` is how many entries of x a sum of products has. Shapes, in two dimensions: x (B, C, H, W) or (C, H, W),
    values (r,) or (B, r); returns (B, 1, 1, 1) or (1, 1, 1), or None in other dtypes.
    """
    if x.dtype is not torch.float16:
        return None
    with torch.no_grad():
        image_dimensions = tuple(range(-dimensions - 1, 0))
        largest = _largest((values,), len(image_dimensions))
        # The norm of ``count`` entries is at most sqrt(count) times the largest entry.
        return _divisor(x.float().abs().amax(image_dimensions, keepdim=True) * count**0.5 * largest)


def divisor_of_sums(a: Tensor, b: Tensor) -> Tensor | None:
    """The power of two to divide ``b`` by, so that aᵀ b and its products with vectors stay in float16's range.

    Shapes: a (N, m), b (N, n); returns (), or None in other dtypes.
    """
    if a.dtype is not torch.float16:
        return None
    with torch.no_grad():
        # An entry of aᵀ b is at most the product of the norms (Cauchy-Schwarz).
        norms = torch.linalg.vector_norm(a, dtype=torch.float32) * torch.linalg.vector_norm(b, dtype=torch.float32)
        return _divisor(norms)


class Divided(torch.autograd.Function):
    """x / divisor before a linear function whose result is `Multiplied`.

    The two cancel in the gradient of x, so it passes through undivided. Divided and multiplied, it could leave
    float16's range on its way.
    """

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
    """projections * values between `Divided` and `Multiplied`, with the undivided gradient of the values."""

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
            # In float32: the divisor gives back the size that float16 could not hold.
            grad_values = (
                (grad_products.float() * projections * divisor.float()).sum_to_size(values.shape).to(values.dtype)
            )
        return grad_projections, grad_values, None


def _largest(values: tuple[Tensor, ...], dimensions: int) -> Tensor:
    """The largest of all values, but at least one.

    A number, or one per sample (B, 1, ...), with so many dimensions after B, if there is a row of values per sample.
    """
    all_values = torch.cat(values, -1) if len(values) > 1 else values[0]
    largest = all_values.abs().amax(-1).clamp(min=1).float()
    return largest.reshape(-1, *[1] * dimensions) if largest.ndim else largest


def _divisor(size: Tensor) -> Tensor:
    """The power of two, at most float16's largest, that brings ``size`` down to 2^`SAFE_EXPONENT` or below."""
    return (size.log2().ceil() - SAFE_EXPONENT).clamp(0, 15).exp2().to(torch.float16)
