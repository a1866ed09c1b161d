"""The mathematics of singular-value tuning: tensors in, tensors out.

A frozen weight W (out, in) is taken apart once and only its singular values are transformed:

    W  = U diag(S) Vᵀ
    W' = U diag(relu(A * S + B)) Vᵀ                 S-SAM, equation 2; A = 1, B = 0 at the start

    x (N, in) ──▶ Vᵀ (r, in) ──▶ * relu(A * S + B) (r) ──▶ U (out, r) ──▶ + bias ──▶ y (N, out)

The product runs through the three factors, so W' is never built, no weight-sized gradient exists, and autograd
keeps x V (N, r) for the backward pass instead of x (N, in).

Shape legend: N rows, r = min(out, in) rank, B batch, H W pixels, g groups of a convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def transform_singular_values(singular_values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(A * S + B), the paper's transformation; every argument and the result have shape (r,)."""
    return F.relu(scale * singular_values + shift)


def factored_linear(x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """x W'ᵀ + bias with W' = left diag(values) right.

    Shapes: x (..., in), left (out, r), values (r,), right (r, in), bias (out,); returns (..., out).
    """
    coordinates = F.linear(x, right)
    return F.linear(coordinates * values.to(coordinates.dtype), left, bias)


def factored_conv2d(
    x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None, convolution: nn.Conv2d
) -> Tensor:
    """The convolution of x with W' = left diag(values) right, one such product per group.

    The rows of ``right`` are the kernels of a first convolution, which has the stride, padding and dilation of
    ``convolution``; ``left`` mixes its r channels pixel by pixel.

    Shapes: x (B, in, H, W), left (g, out/g, r), values (g * r,), right (g, r, in/g * kh * kw), bias (out,); as for
    any convolution, x may come without B.
    """
    groups, rank = right.shape[:2]
    kernels = right.reshape(groups * rank, -1, *convolution.kernel_size)
    coordinates = convolution._conv_forward(x, kernels, None)
    coordinates = coordinates * values.to(coordinates.dtype)[:, None, None]
    return F.conv2d(coordinates, left.reshape(-1, rank, 1, 1), bias, groups=groups)


def weight_change(left: Tensor, delta: Tensor, right: Tensor) -> Tensor:
    """W' - W = left diag(delta) right, for merging: exactly zero where delta is zero.

    Shapes: left (g, out, r), delta (g * r,), right (g, r, in); returns (g, out, in) in float32 or better.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    delta = delta.to(dtype).reshape(left.shape[0], 1, -1)
    return (left.to(dtype) * delta) @ right.to(dtype)
