"""The mathematics of singular-value tuning: tensors in, tensors out.

A frozen weight W (out, in) is taken apart once and only its singular values are transformed:

    W  = U diag(S) Vᵀ
    W' = U diag(relu((1 + a) * S + B)) Vᵀ           S-SAM, equation 2, whose A is 1 + a; a = 0, B = 0 at the start

    x (N, in) ──▶ Vᵀ (r, in) ──▶ * relu((1 + a) * S + B) (r) ──▶ U (out, r) ──▶ + bias ──▶ y (N, out)

a and B are differences from the identity, so weight decay pulls towards the frozen weight.
With delta = relu((1 + a) * S + B) - S there are four forms of the product, which hold other vectors and cost other
multiply-adds. Forward and backward for N rows, where the frozen layer takes 2 N out in:

    form        product                          multiply-adds a step               holds        taken where
    factored    U diag(S + delta) Vᵀ x           2 N r (out + in)                   U, V         all are tuned
    rebuilt     (W + U diag(delta) Vᵀ) x         3 out in (N + r)                   U, V         and this costs less
    one-sided   W (x + V diag(delta / S) Vᵀ x)   2 N out in + 4 N r min(out, in)    V            few are, W is quan-
                                                                                              tised, or on demand
    delta       W x + U diag(delta) Vᵀ x         2 N out in + 2 N r (out + in)      U, V         the others cannot be

The one-sided form rests on U = W V / S, has a mirror for out < in, W x + U diag(delta / S) Uᵀ W x, and leaves to the
delta form the few values that are too small to be divided by. Rebuilt, one-sided and delta are W x to the last bit
while delta is zero. One row of values is shared by a whole batch, or each sample brings its own.

Shape legend: N rows, r rank: how many values are tuned, B batch, H W pixels, g groups of a convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from svdtune.float16 import Divided, Multiplied, ScaledProjections, divisor_of_images, divisor_of_rows, divisor_of_sums

# Projections of rows, and by what the rows were divided before, if they were (see `divisor_of_rows`).
Coordinates = tuple[Tensor, Tensor | None]


def change_of_singular_values(
    singular_values: Tensor, a: Tensor | float = 0.0, b: Tensor | float = 0.0, nonlinearity: str = "relu"
) -> Tensor:
    """relu((1 + a) * S + b) - S, what the paper's transformation adds; every tensor and the result are (..., r).

    With ``nonlinearity="none"`` it is a * S + b, which may turn a singular value negative. Exactly zero where a and b
    are zero.
    """
    change = a * singular_values + b
    if nonlinearity == "none":
        return change
    least = -singular_values
    return torch.where(change <= least, least, change)


def scaled_linear(x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias with W = left diag(values) right: the factored form. W is never built, and the backward pass keeps
    x V (N, r) instead of x (N, in).

    Shapes: x (..., in), left (out, r), right (r, in), bias (out,); values (r,), or (B, r) with a row for each sample
    of x (B, ..., in). Returns (..., out), computed in the dtype of x, or autocast's where it is on. ``left`` and
    ``right`` get no gradient, and there is no forward-mode differentiation.
    """
    x = _as_autocast_would(x)
    if values.ndim == 1 and torch.is_grad_enabled():
        return _ScaledLinear.apply(x, left, values, right, bias)[0]
    return _scaled_linear(x, left, values, right, bias)[0]


def _scaled_linear(x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The product, and x V; in float16 x V / divisor, and the divisor of each row (see `divisor_of_rows`)."""
    divisor = divisor_of_rows(x, values)
    coordinates = F.linear(x if divisor is None else x / divisor, right.to(x.dtype))
    if divisor is None:
        return _scale_and_multiply(coordinates, values, left, bias), coordinates
    y = _scale_and_multiply(coordinates, values, left) * divisor
    return y if bias is None else y + bias.to(y.dtype), coordinates, divisor


class _ScaledLinear(torch.autograd.Function):
    """`scaled_linear` with fewer passes over memory than autograd would make: the values are multiplied to rows or to
    vectors, whichever are fewer, and gradients are summed in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        # x V is an output, so that whoever differentiates twice comes by it to x.
        return _scaled_linear(x, left, values, right, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, left, values, right, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(left, values, right, *output[1:])

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_coordinates: Tensor | None, *grad_divisor: None
    ) -> tuple[Tensor | None, ...]:
        left, values, right, coordinates, *divisors = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if grad_y is not None:
            divisor = divisor_of_rows(grad_y, values)
            grad_products = (grad_y if divisor is None else grad_y / divisor) @ left.to(grad_y.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = _times(_scale_and_multiply(grad_products, values, right.mT), divisor)
            if ctx.needs_input_grad[2]:
                if divisor is not None:
                    grad_products = grad_products.float() * divisor * divisors[0]
                grad_values = _sum_of_products(grad_products, coordinates, values.dtype)
            if ctx.needs_input_grad[4]:
                grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
        if grad_coordinates is not None and ctx.needs_input_grad[0]:
            through = grad_coordinates @ right.to(grad_coordinates.dtype)
            through = through / divisors[0] if divisors else through
            grad_x = through if grad_x is None else grad_x + through
        return grad_x, None, grad_values, None, grad_bias


def rebuilt_linear(
    x: Tensor, weight: Tensor, left: Tensor, delta: Tensor, right: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x W'ᵀ + bias with W' = weight + left diag(delta) right, built in the forward and again in the backward pass.

    Shapes: x (..., in), weight (out, in), left (out, r), delta (r,), right (r, in), bias (out,). Returns (..., out).
    Computed in the dtype of x, or autocast's where it is on. ``weight``, ``left`` and ``right`` get no gradient.
    """
    return _RebuiltLinear.apply(_as_autocast_would(x), weight, left, delta, right, bias)


class _RebuiltLinear(torch.autograd.Function):
    """`rebuilt_linear` without keeping W', which is small beside the rows but would be kept for each layer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, left: Tensor, delta: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        rebuilt = _rebuilt(weight, left, delta, right, x.dtype)
        return _linear(x, rebuilt, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, delta, right = ctx.saved_tensors
        grad_x = grad_delta = grad_bias = None
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ _rebuilt(weight, left, delta, right, grad_y.dtype)
        if ctx.needs_input_grad[3]:
            x = x.reshape(-1, x.shape[-1])
            divisor = divisor_of_sums(rows, x)
            grad_weight = rows.mT @ (x if divisor is None else x / divisor)
            of_vectors = (left.mT.to(grad_weight) @ grad_weight).mT
            of_vectors = of_vectors if divisor is None else of_vectors.float() * divisor
            grad_delta = _sum_of_products(of_vectors, right.mT, delta.dtype)
        if ctx.needs_input_grad[5]:
            grad_bias = rows.sum(0)
        return grad_x, None, None, grad_delta, None, grad_bias


def rebuilding_costs_less(rows: int, out_features: int, in_features: int, backward: bool) -> bool:
    """Whether `rebuilt_linear` takes fewer multiply-adds than `scaled_linear` for that many rows, at full rank.

    For the forward pass alone, it does where there are more rows than the larger side. With the backward pass it can
    only where the weight is nearly square, and it keeps x in place of x V; so never where x is larger.
    """
    rank = min(out_features, in_features)
    factored = rows * rank * (out_features + in_features)
    rebuilt = (rows + rank) * out_features * in_features
    if not backward:
        return _holds(rebuilt < factored)
    return in_features == rank and _holds(3 * rebuilt < 2 * factored)


def coordinates_of(x: Tensor, vectors: Tensor, *values: Tensor, bias: Tensor | None = None) -> Coordinates:
    """x vectorsᵀ + bias, to be multiplied by each of ``values`` in `corrected`.

    Shapes: x (..., n), vectors (r, n), bias (r,); values (r,), or (B, r) with a row for each sample of x (B, ..., n).
    """
    x = _as_autocast_would(x)
    divisor = divisor_of_rows(x, *values)
    if divisor is None:
        return F.linear(x, vectors, bias), None
    coordinates = F.linear(Divided.apply(x, divisor), vectors)
    return coordinates if bias is None else coordinates + bias / divisor, divisor


def corrected(x: Tensor, coordinates: Coordinates, values: Tensor, vectors: Tensor) -> Tensor:
    """x + (coordinates * values) vectors: what the one-sided form does to its input or output, and the delta form to
    its output.

    Shapes: x (..., n), coordinates (..., r), vectors (r, n); values (r,), or (B, r) with a row for each sample.
    Returns (..., n) in the dtype of x, and exactly x where values are zero.
    """
    projections, divisor = coordinates
    if divisor is not None:
        products = ScaledProjections.apply(projections, _for_each_row(values, projections.ndim), divisor)
        return x + Multiplied.apply(products @ vectors.to(products.dtype), divisor).to(x.dtype)
    products = _scaled(projections, values)
    if products.dtype != x.dtype:
        return x + (products @ vectors).to(x.dtype)
    rows = products.reshape(-1, products.shape[-1])
    return torch.addmm(x.reshape(-1, x.shape[-1]), rows, vectors).reshape(x.shape)


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
    kernels = right.reshape(groups * rank, -1, *convolution.kernel_size).to(x.dtype)
    x = _as_autocast_would(x)
    divisor = divisor_of_images(x, values, kernels[0].numel(), dimensions)
    images = x if divisor is None else Divided.apply(x, divisor)
    coordinates = convolution._conv_forward(images, kernels, None)  # type: ignore[arg-type]
    of_channels = values.reshape(*values.shape, *[1] * dimensions)
    mix = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    channels = left.reshape(-1, rank, *[1] * dimensions).to(x.dtype)
    if divisor is None:
        return mix((coordinates * of_channels).to(coordinates.dtype), channels, bias, groups=groups)
    y = mix(ScaledProjections.apply(coordinates, of_channels, divisor), channels, groups=groups)
    y = Multiplied.apply(y, divisor)
    return y if bias is None else y + bias.reshape(-1, *[1] * dimensions).to(y.dtype)


def corrected_channels(y: Tensor, left: Tensor, values: Tensor, bias: Tensor | None, dimensions: int) -> Tensor:
    """y + left diag(values) leftᵀ (y - bias), pixel by pixel: the one-sided form of a convolution whose output is y.

    Shapes, in two dimensions: y (B, out, H, W), left (g, out/g, r), bias (out,); values (g * r,), or (B, g * r).
    Returns the shape of y, which may come without B.
    """
    groups = len(left)
    images = _as_autocast_would(y)
    left = left.to(images.dtype)
    divisor = divisor_of_images(images, values, y.shape[-dimensions - 1], dimensions)
    if divisor is not None:
        images, divisor = Divided.apply(images, divisor), divisor.flatten(-dimensions).unsqueeze(-1)
    coordinates = left.mT @ images.flatten(-dimensions).unflatten(-2, (groups, -1))
    if bias is not None:
        of_bias = left.mT @ bias.reshape(groups, -1, 1).to(left.dtype)
        coordinates = coordinates - (of_bias if divisor is None else of_bias / divisor)
    of_groups = values.unflatten(-1, (groups, -1, 1))
    if divisor is None:
        return y + (left @ (coordinates * of_groups).to(coordinates.dtype)).reshape(y.shape).to(y.dtype)
    products = left @ ScaledProjections.apply(coordinates, of_groups, divisor)
    return y + Multiplied.apply(products, divisor).reshape(y.shape).to(y.dtype)


def weight_change(left: Tensor, delta: Tensor, right: Tensor) -> Tensor:
    """W' - W = left diag(delta) right, for merging: exactly zero where delta is zero.

    Shapes: left (g, out, r), delta (g * r,), right (g, r, in); returns (g, out, in) in float32 or better.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    delta = delta.to(dtype).reshape(left.shape[0], 1, -1)
    return (left.to(dtype) * delta) @ right.to(dtype)


def _times(x: Tensor, divisor: Tensor | None) -> Tensor:
    return x if divisor is None else x * divisor


def _holds(condition: bool) -> bool:
    """A comparison of sizes; False where a compiler or an exporter leaves them open, so that its graph serves all."""
    return statically_known_true(condition) if torch.compiler.is_compiling() else condition


def _scaled(coordinates: Tensor, values: Tensor) -> Tensor:
    """``coordinates`` (B, ..., r) times ``values`` (r,) or (B, r), multiplied in the values' precision."""
    return (coordinates * _for_each_row(values, coordinates.ndim)).to(coordinates.dtype)


def _for_each_row(values: Tensor, dimensions: int) -> Tensor:
    """``values`` (r,) or (B, r), to be multiplied with a tensor (B, ..., r) of that many dimensions."""
    return values if values.ndim == 1 else values.reshape(len(values), *[1] * (dimensions - 2), -1)


def _scale_and_multiply(rows: Tensor, values: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """(rows * values) matrixᵀ + bias, in the dtype of rows; the values go to the matrix where that has fewer rows.

    Shapes: rows (..., r), values (r,) or (B, r), matrix (out, r), bias (out,); returns (..., out).
    """
    bias = None if bias is None else bias.to(rows.dtype)
    if values.ndim == 1 and _holds(rows.numel() > matrix.numel()):
        return _linear(rows, (matrix * values).to(rows.dtype), bias)
    return _linear(_scaled(rows, values), matrix.to(rows.dtype), bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but never a view, as that is with a bias: nobody could change one of ours in place."""
    if bias is None or x.ndim == 2:
        return F.linear(x, weight, bias)
    rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.mT)
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], weight.shape[0]])


def _rebuilt(weight: Tensor, left: Tensor, delta: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """W + U diag(delta) Vᵀ, from factors that are rounded to ``dtype`` first."""
    return torch.addmm(weight.to(dtype), (left * delta).to(dtype), right.to(dtype))


def _sum_of_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of a * b (..., r) over all but the last dimension, (r,); ``a`` is overwritten where nobody needs it."""
    products = a * b if torch.is_grad_enabled() else a.mul_(b)
    return products.reshape(-1, products.shape[-1]).sum(0, dtype=dtype)


def _as_autocast_would(x: Tensor) -> Tensor:
    """x in autocast's dtype where it is on: what it goes into is no function that autocast knows."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
