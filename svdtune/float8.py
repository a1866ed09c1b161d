"""Weights in float8, for which torch has hardly a function."""

from __future__ import annotations

from torch import Tensor


def is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def readable(tensor: Tensor) -> Tensor:
    """The tensor, in bfloat16 if it is in float8: that holds all its values."""
    return tensor.bfloat16() if is_float8(tensor) else tensor
