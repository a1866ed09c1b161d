"""Weights in float8, which few functions of torch support."""

from __future__ import annotations

from torch import Tensor


def is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def readable(tensor: Tensor) -> Tensor:
    """Converts a float8 tensor to bfloat16, which represents its values exactly. Returns other tensors unchanged."""
    return tensor.bfloat16() if is_float8(tensor) else tensor
