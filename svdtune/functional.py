"""The mathematics of singular-value tuning: tensors in, tensors out.

A frozen weight W (out, in) is taken apart once and only its singular values are transformed:

    W  = U diag(S) Vᵀ
    W' = U diag(relu((1 + a) * S + B)) Vᵀ           S-SAM, equation 2, whose A is 1 + a; a = 0, B = 0 at the start

    x (N, in) ──▶ Vᵀ (r, in) ──▶ * relu((1 + a) * S + B) (r) ──▶ U (out, r) ──▶ + bias ──▶ y (N, out)

a is the difference from A = 1, so weight decay on a and B pulls towards the frozen weight.
With delta = relu((1 + a) * S + B) - S the product has several forms. They hold different vectors and cost different
numbers of multiply-adds. A step is a forward and a backward pass of N rows; the frozen layer's takes 2 N out in:

    form           product                       multiply-adds per step         holds  taken where
    factored       U diag(S + delta) Vᵀ x        2 N r (out + in)               U, V   all values are tuned
    rebuilt        (W + U diag(delta) Vᵀ) x      3 out in (N + r)               U, V   it costs less, keeps no more
    one-sided (V)  W (x + V diag(delta/S) Vᵀ x)  2 N out in + 4 N r in          V      few values, packed W, on demand
    one-sided (U)  W x + U diag(delta/S) Uᵀ W x  2 N out in + 4 N r out         U      the same, where out < in
    delta          W x + U diag(delta) Vᵀ x      2 N out in + 2 N r (out + in)  U, V   no other form can be

The one-sided forms rest on U = W V / S. They divide by S, so values too small to divide by take the delta form.
All forms but the factored one are W x to the last bit while delta is zero. `svdtune.forms` has the forms as objects
and the rule that chooses one. A batch shares one row of values, or each sample brings its own.

Shapes: N rows, r rank (how many values are tuned), B batch, H W pixels, g groups of a convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from svdtune.float16 import Divided, Multiplied, ScaledProjections, divisor_of_images, divisor_of_rows, divisor_of_sums

# Projections of rows, and the divisor of each row in float16 (see `divisor_of_rows`).
Coordinates = tuple[Tensor, Tensor | None]


def delta_of_singular_values(
    singular_values: Tensor, a: Tensor | float = 0.0, b: Tensor | float = 0.0, nonlinearity: str = "relu"
) -> Tensor:
    """delta = relu((1 + a) * S + b) - S, the change of the singular values; all tensors are (..., r).

    With ``nonlinearity="none"`` it is a * S + b, which may turn a singular value negative. It is exactly zero where a
    and b are zero.
    """
    delta = a * singular_values + b
    if nonlinearity == "none":
        return delta
    # ReLU as a lower limit of delta: (S + delta).relu() - S would round, and not be zero at the start.
    lowest = -singular_values
    # `where` keeps NaN, so a broken adapter is seen, and a value at the limit gets no gradient.
    return torch.where(delta <= lowest, lowest, delta)


def scaled_linear(x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias with W = left diag(values) right: the factored form.

    W is never built. The backward pass keeps x V (N, r) instead of x (N, in).

    Shapes: x (..., in), left (out, r), right (r, in), bias (out,); values (r,), or (B, r) with a row per sample of
    x (B, ..., in). Returns (..., out), computed in the dtype of x, or in autocast's where it is on. ``left`` and
    ``right`` get no gradient, and there is no forward-mode differentiation.
    """
    x = _as_autocast_would(x)
    if values.ndim == 1 and torch.is_grad_enabled():
        return _ScaledLinear.apply(x, left, values, right, bias)[0]
    return _scaled_linear(x, left, values, right, bias)[0]


def _scaled_linear(x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The product and x V; in float16 the product, x V / divisor, and each row's divisor (see `divisor_of_rows`)."""
    divisor = divisor_of_rows(x, values)
    coordinates = F.linear(x if divisor is None else x / divisor, right.to(x.dtype))
    if divisor is None:
        return _scale_and_multiply(coordinates, values, left, bias), coordinates
    y = _scale_and_multiply(coordinates, values, left) * divisor
    return y if bias is None else y + bias.to(y.dtype), coordinates, divisor


class _ScaledLinear(torch.autograd.Function):
    """`scaled_linear` with fewer passes over memory than autograd would make.

    The values multiply the rows or the vectors, whichever are fewer, and gradients are summed in place.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, left: Tensor, values: Tensor, right: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        # Return x V as an output, so that double backward can reach x through it.
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
            # grad_y U, of which both gradients are made: y = ((x V) * values) Uᵀ.
            grad_products = (grad_y if divisor is None else grad_y / divisor) @ left.to(grad_y.dtype)
            if ctx.needs_input_grad[0]:
                grad_x = _multiplied(_scale_and_multiply(grad_products, values, right.mT), divisor)
            if ctx.needs_input_grad[2]:
                if divisor is not None:  # both factors were divided; their product fits float32
                    grad_products = grad_products.float() * divisor * divisors[0]
                grad_values = _sum_of_products(grad_products, coordinates, values.dtype)
            if ctx.needs_input_grad[4]:
                grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
        # Only a double backward has a gradient of x V itself.
        if grad_coordinates is not None and ctx.needs_input_grad[0]:
            grad_from_coordinates = grad_coordinates @ right.to(grad_coordinates.dtype)
            grad_from_coordinates = grad_from_coordinates / divisors[0] if divisors else grad_from_coordinates
            grad_x = grad_from_coordinates if grad_x is None else grad_x + grad_from_coordinates
        return grad_x, None, grad_values, None, grad_bias


def rebuilt_linear(
    x: Tensor, weight: Tensor, left: Tensor, delta: Tensor, right: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x W'ᵀ + bias with W' = weight + left diag(delta) right: the rebuilt form.

    W' is built in the forward pass, and again in the backward pass.

    Shapes: x (..., in), weight (out, in), left (out, r), delta (r,), right (r, in), bias (out,). Returns (..., out).
    Computed in the dtype of x, or autocast's where it is on. ``weight``, ``left`` and ``right`` get no gradient.
    """
    return _RebuiltLinear.apply(_as_autocast_would(x), weight, left, delta, right, bias)


class _RebuiltLinear(torch.autograd.Function):
    """`rebuilt_linear` without keeping W' for the backward pass, which would be one more weight per layer."""

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
            # The gradient of delta is the diagonal of Uᵀ grad_W V: Uᵀ grad_W (r, in), times Vᵀ, summed along its rows.
            projected = (left.mT.to(grad_weight) @ grad_weight).mT
            projected = projected if divisor is None else projected.float() * divisor
            grad_delta = _sum_of_products(projected, right.mT, delta.dtype)
        if ctx.needs_input_grad[5]:
            grad_bias = rows.sum(0)
        return grad_x, None, None, grad_delta, None, grad_bias


def project(x: Tensor, vectors: Tensor, *values: Tensor, bias: Tensor | None = None) -> Coordinates:
    """x vectorsᵀ + bias, which `add_scaled` multiplies by each of ``values``.

    In float16 the rows are divided first, by as much as the largest of ``values`` asks for.

    Shapes: x (..., n), vectors (r, n), bias (r,); values (r,), or (B, r) with a row per sample of x (B, ..., n).
    """
    x = _as_autocast_would(x)
    divisor = divisor_of_rows(x, *values)
    if divisor is None:
        return F.linear(x, vectors, bias), None
    coordinates = F.linear(Divided.apply(x, divisor), vectors)
    return coordinates if bias is None else coordinates + bias / divisor, divisor


def add_scaled(x: Tensor, coordinates: Coordinates, values: Tensor, vectors: Tensor) -> Tensor:
    """x + (coordinates * values) vectors.

    The one-sided forms do this to their input or output, and the delta form to its output.

    Shapes: x (..., n), coordinates (..., r), vectors (r, n); values (r,), or (B, r) with a row per sample.
    Returns (..., n) in the dtype of x, and exactly x where values are zero.
    """
    projections, divisor = coordinates
    if divisor is not None:
        products = ScaledProjections.apply(projections, _for_each_row(values, projections.ndim), divisor)
        return x + Multiplied.apply(products @ vectors.to(products.dtype), divisor).to(x.dtype)
    products = _scaled(projections, values)
    if products.dtype != x.dtype:
        return x + (products @ vectors).to(x.dtype)
    # One pass over x instead of a product and a sum.
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

    The rows of ``right`` are the kernels of a first convolution, with the stride, padding and dilation of
    ``convolution``. A second one, of size 1, mixes its r channels by ``left``.

    Shapes, in two dimensions: x (B, in, H, W), left (g, out/g, r), right (g, r, in/g * kh * kw), bias (out,); values
    (g * r,), or (B, g * r) with a row per sample. As for any convolution, x may come without B.
    """
    groups, rank = right.shape[:2]
    dimensions = len(convolution.kernel_size)
    kernels = right.reshape(groups * rank, -1, *convolution.kernel_size).to(x.dtype)
    x = _as_autocast_would(x)
    divisor = divisor_of_images(x, values, kernels[0].numel(), dimensions)
    images = x if divisor is None else Divided.apply(x, divisor)
    # Padding included: modes such as "reflect" pad in `_conv_forward`.
    coordinates = convolution._conv_forward(images, kernels, None)  # type: ignore[arg-type]
    # One value per channel, the same at every pixel; then a 1x1 convolution with U.
    channel_values = values.reshape(*values.shape, *[1] * dimensions)
    mix = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    channels = left.reshape(-1, rank, *[1] * dimensions).to(x.dtype)
    if divisor is None:
        return mix((coordinates * channel_values).to(coordinates.dtype), channels, bias, groups=groups)
    y = mix(ScaledProjections.apply(coordinates, channel_values, divisor), channels, groups=groups)
    y = Multiplied.apply(y, divisor)
    return y if bias is None else y + bias.reshape(-1, *[1] * dimensions).to(y.dtype)


def add_scaled_channels(y: Tensor, left: Tensor, values: Tensor, bias: Tensor | None, dimensions: int) -> Tensor:
    """y + left diag(values) leftᵀ (y - bias) at each pixel: the one-sided form of a convolution with output y.

    Shapes, in two dimensions: y (B, out, H, W), left (g, out/g, r), bias (out,); values (g * r,), or (B, g * r).
    Returns the shape of y, which may come without B.
    """
    groups = len(left)
    images = _as_autocast_would(y)
    left = left.to(images.dtype)
    divisor = divisor_of_images(images, values, y.shape[-dimensions - 1], dimensions)
    if divisor is not None:
        images, divisor = Divided.apply(images, divisor), divisor.flatten(-dimensions).unsqueeze(-1)
    # Uᵀ y of each group, (B, g, r, H * W).
    coordinates = left.mT @ images.flatten(-dimensions).unflatten(-2, (groups, -1))
    if bias is not None:
        # Only W x is scaled, so Uᵀ bias is subtracted here: y - bias would be one more tensor of the size of y.
        projected_bias = left.mT @ bias.reshape(groups, -1, 1).to(left.dtype)
        coordinates = coordinates - (projected_bias if divisor is None else projected_bias / divisor)
    group_values = values.unflatten(-1, (groups, -1, 1))
    if divisor is None:
        return y + (left @ (coordinates * group_values).to(coordinates.dtype)).reshape(y.shape).to(y.dtype)
    products = left @ ScaledProjections.apply(coordinates, group_values, divisor)
    return y + Multiplied.apply(products, divisor).reshape(y.shape).to(y.dtype)


def weight_change(left: Tensor, delta: Tensor, right: Tensor) -> Tensor:
    """W' - W = left diag(delta) right, for merging: exactly zero where delta is zero.

    Shapes: left (g, out, r), delta (g * r,), right (g, r, in); returns (g, out, in) in float32 or better.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    delta = delta.to(dtype).reshape(left.shape[0], 1, -1)
    return (left.to(dtype) * delta) @ right.to(dtype)


def _multiplied(x: Tensor, divisor: Tensor | None) -> Tensor:
    return x if divisor is None else x * divisor


def known_to_hold(condition: bool) -> bool:
    """Whether a comparison of sizes is true.

    False where a compiler or exporter leaves the sizes open, so that one graph serves all sizes.
    """
    return statically_known_true(condition) if torch.compiler.is_compiling() else condition


def _scaled(coordinates: Tensor, values: Tensor) -> Tensor:
    """``coordinates`` (B, ..., r) times ``values`` (r,) or (B, r), multiplied in the values' precision."""
    return (coordinates * _for_each_row(values, coordinates.ndim)).to(coordinates.dtype)


def _for_each_row(values: Tensor, dimensions: int) -> Tensor:
    """``values`` (r,) or (B, r) in a shape that multiplies a tensor (B, ..., r) of so many dimensions."""
    return values if values.ndim == 1 else values.reshape(len(values), *[1] * (dimensions - 2), -1)


def _scale_and_multiply(rows: Tensor, values: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """(rows * values) matrixᵀ + bias, in the dtype of rows. The values multiply whichever is smaller.

    Shapes: rows (..., r), values (r,) or (B, r), matrix (out, r), bias (out,); returns (..., out).
    """
    bias = None if bias is None else bias.to(rows.dtype)
    if values.ndim == 1 and known_to_hold(rows.numel() > matrix.numel()):
        return _linear(rows, (matrix * values).to(rows.dtype), bias)
    return _linear(_scaled(rows, values), matrix.to(rows.dtype), bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but never a view.

    F.linear with a bias returns a view for x of three dimensions or more. Autograd forbids changing a view that a
    custom function returned in place.
    """
    if bias is None or x.ndim == 2:
        return F.linear(x, weight, bias)
    rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.mT)
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], weight.shape[0]])


def _rebuilt(weight: Tensor, left: Tensor, delta: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """W + U diag(delta) Vᵀ; the factors are rounded to ``dtype`` first."""
    return torch.addmm(weight.to(dtype), (left * delta).to(dtype), right.to(dtype))


def _sum_of_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of a * b (..., r) over all but the last dimension, (r,)."""
    # In place, unless a double backward needs ``a``.
    products = a * b if torch.is_grad_enabled() else a.mul_(b)
    return products.reshape(-1, products.shape[-1]).sum(0, dtype=dtype)


def _as_autocast_would(x: Tensor) -> Tensor:
    """x in autocast's dtype, where it is on: autocast does not know our functions."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
