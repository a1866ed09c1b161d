"""Tests on a few rows whether a module of a subclass computes the same as its base class."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Rows of several magnitudes reveal a clamp, an activation or a rescaling.
SIZES = (0.01, 1.0, 100.0)
# Tolerance, in units of rounding: the order of summation may differ.
ROUNDINGS = 64


@torch.no_grad()
def computes_the_same(module: nn.Module, base_type: type[nn.Module]) -> bool:
    """Whether calling ``module`` gives the same as the forward of ``base_type`` with its weight and bias.

    Returns False if the weight is on the meta device, or if the forward needs several tensors.
    """
    weight = cast(Tensor, module.weight)
    if weight.is_meta or not weight.is_floating_point():
        return False
    devices = [weight.device] if weight.device.type == "cuda" else []
    # The forward may draw random numbers. It must not advance the generator of the user's training.
    with torch.random.fork_rng(devices):
        try:
            x = _rows(module, base_type, weight)
            actual, expected = module(x), base_type.forward(module, x)
            if base_type is nn.Embedding and hasattr(module, "embed_scale"):  # a tuned embedding supports it
                expected = expected * module.embed_scale
        except Exception:  # an unknown forward may raise anything
            return False
    if not isinstance(actual, Tensor) or actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    difference, size = (actual - expected).double().abs(), expected.double().abs().amax(-1, keepdim=True)
    return bool((difference <= ROUNDINGS * torch.finfo(expected.dtype).eps * size).all())


def _rows(module: Any, base_type: type[nn.Module], weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if base_type is nn.Embedding:
        return torch.randint(0, len(weight), (len(SIZES), 2), generator=generator).to(weight.device)
    if base_type in (nn.Linear, Conv1D):
        shape = [weight.shape[1 if base_type is nn.Linear else 0]]
    else:
        extents = zip(module.kernel_size, module.dilation, strict=True)
        shape = [module.in_channels, *((kernel - 1) * dilation + 2 for kernel, dilation in extents)]
    rows = torch.randn(len(SIZES), *shape, generator=generator)
    sizes = torch.tensor(SIZES).view(-1, *[1] * len(shape))
    return (rows * sizes).to(weight)
