"""The mathematics of singular-value tuning: tensors in, tensors out.

A frozen weight W (out, in) is taken apart once and only its singular values are transformed:

    W  = U diag(S) Vᵀ
    W' = U diag(relu(A * S + B)) Vᵀ                 S-SAM, equation 2; A = 1, B = 0 at the start

    x (N, in) ──▶ Vᵀ (r, in) ──▶ * relu(A * S + B) (r) ──▶ U (out, r) ──▶ + bias ──▶ y (N, out)

The product runs through the three factors, so W' is never built, no weight-sized gradient exists, and autograd
keeps x V (N, r) for the backward pass instead of x (N, in). Two forms of it are in use, with the same functions:

    factored   U diag(S + delta) Vᵀ x                all singular values are tuned
    delta      W x + U diag(delta) Vᵀ x              the leading ones are, or W is quantised; exactly W x at the start

with delta = relu(A * S + B) - S. One row of values is shared by a whole batch, or each sample brings its own.

Shape legend: N rows, r = min(out, in) rank, B batch, H W pixels, g groups of a convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def transform_singular_values(
    singular_values: Tensor, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0, nonlinearity: str = "relu"
) -> Tensor:
    """relu(A * S + B), the paper's transformation; every tensor and the result have shape (..., r).

    With ``nonlinearity="none"`` it is A * S + B, which may turn a singular value negative.
    """
    transformed = scale * singular_values + shift
    return F.relu(transformed) if nonlinearity == "relu" else transformed


def scaled_linear(x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias with W = left diag(values) right.

    Shapes: x (..., in), left (out, r), right (r, in), bias (out,); values (r,), or (B, r) with a row for each sample
    of x (B, ..., in). Returns (..., out).
    """
    coordinates = F.linear(x, right)
    return F.linear(coordinates * _per_sample(values, coordinates), left, bias)


def scaled_embedding(indices: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """The rows ``indices`` of W = left diag(values) right.

    Shapes: indices (...), left (rows, r), right (r, features); values (r,), or (B, r) for indices (B, ...).
    Returns (..., features).
    """
    coordinates = F.embedding(indices, left)
    return F.linear(coordinates * _per_sample(values, coordinates), right.mT)


def scaled_convolution(
    x: Tensor,
    left: Tensor,
    values: Tensor,
    right: Tensor,
    bias: Tensor | None,
    convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d,
) -> Tensor:
    """The convolution of x with W = left diag(values) right, one such product per group.

    The rows of ``right`` are the kernels of a first convolution, which has the stride, padding and dilation of
    ``convolution``; ``left`` mixes its r channels pixel by pixel.

    Shapes, in two dimensions: x (B, in, H, W), left (g, out/g, r), right (g, r, in/g * kh * kw), bias (out,); values
    (g * r,), or (B, g * r) with a row for each sample. As for any convolution, x may come without B.
    """
    groups, rank = right.shape[:2]
    dimensions = len(convolution.kernel_size)
    kernels = right.reshape(groups * rank, -1, *convolution.kernel_size)
    coordinates = convolution._conv_forward(x, kernels, None)  # type: ignore[arg-type]
    coordinates = coordinates * values.to(coordinates.dtype).reshape(*values.shape, *[1] * dimensions)
    mix = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    return mix(coordinates, left.reshape(-1, rank, *[1] * dimensions), bias, groups=groups)


def weight_change(left: Tensor, delta: Tensor, right: Tensor) -> Tensor:
    """W' - W = left diag(delta) right, for merging: exactly zero where delta is zero.

    Shapes: left (g, out, r), delta (g * r,), right (g, r, in); returns (g, out, in) in float32 or better.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    delta = delta.to(dtype).reshape(left.shape[0], 1, -1)
    return (left.to(dtype) * delta) @ right.to(dtype)


def _per_sample(values: Tensor, coordinates: Tensor) -> Tensor:
    """``values`` (r,) or (B, r) so that they multiply ``coordinates`` (B, ..., r)."""
    values = values.to(coordinates.dtype)
    return values if values.ndim == 1 else values.reshape(len(values), *[1] * (coordinates.ndim - 2), -1)
