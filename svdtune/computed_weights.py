"""Weights that a module computes from other parameters: a decomposition would expire, and a merge would be lost."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

REMEDY = (
    "Make it permanent first, with remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove "
    "of torch.nn.utils."
)


def is_computed(module: nn.Module, parameter_name: str) -> bool:
    """Whether weight norm, spectral norm, a parametrization or pruning computes the parameter."""
    path, _, name = parameter_name.rpartition(".")
    holder = module.get_submodule(path)
    from_others = any(f"{name}{ending}" in holder._parameters for ending in ("_orig", "_g", "_v"))
    return from_others or parametrize.is_parametrized(holder, name)
