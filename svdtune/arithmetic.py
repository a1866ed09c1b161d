"""Weighted sums of adapters. All adapters of a layer share U and V, so a sum is exact.

An adapter changes W by U diag(delta) Vᵀ with delta = relu(A * S + B) - S. The sum of adapters with weights w has the
change sum(w * delta). An adapter with A = 1, B = sum(w * delta) and no ReLU represents it exactly.

A and B must not be summed themselves. Where the ReLU of an adapter returns zero, doubling A and B does not double
delta. A sum can also make a singular value negative, which a ReLU would set to zero, so the sum has no ReLU.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Literal

from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from svdtune.config import SVDScaleShiftConfig
from svdtune.layer import SVDScaleShiftLayer
from svdtune.param_wrapper import ParamWrapper

COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def combine_deltas(
    deltas: list[Tensor],
    weights: Tensor,
    combination_type: str,
    density: float,
    majority_sign_method: Literal["total", "frequency"],
) -> Tensor:
    """Combines the changes of one layer's singular values from several adapters.

    Args:
        deltas: relu(A * S + B) - S per adapter, each (r,), in units of the singular values.
        weights: One weight per adapter, (len(deltas),).
        combination_type: One of `COMBINATIONS`.
        density: Fraction of values that all types except "linear" keep, in (0, 1].
        majority_sign_method: "total" or "frequency", for the two kinds of ties.

    Returns:
        The combined change, (r,).
    """
    if combination_type == "linear":
        return task_arithmetic(deltas, weights)
    if combination_type == "magnitude_prune":
        return magnitude_prune(deltas, weights, density)
    if combination_type == "dare_linear":
        return dare_linear(deltas, weights, density)
    combine = ties if combination_type == "ties" else dare_ties
    return combine(deltas, weights, density, majority_sign_method)


def check_combination(combination_type: str, density: float | None, majority_sign_method: str) -> None:
    """Validates the arguments of a combination.

    Raises:
        ValueError: if an argument has an unsupported value, or if ``density`` is missing.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(f"`combination_type` is {combination_type!r}; it can be {', '.join(COMBINATIONS)}.")
    if combination_type != "linear" and density is None:
        raise ValueError(f"combination_type {combination_type!r} needs a `density` between 0 and 1.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"`density` is {density}; it must be above 0 and at most 1.")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"`majority_sign_method` is {majority_sign_method!r}; it can be total, frequency.")


def count_shared_modules_to_save(model: nn.Module, adapters: list[str]) -> int:
    """The number of modules in ``modules_to_save`` of which several adapters have a copy."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return sum(len(set(adapters) & set(wrapper.modules_to_save)) > 1 for wrapper in wrappers)


def combined_config(
    configs: list[SVDScaleShiftConfig], adapters: list[str], layers: dict[str, SVDScaleShiftLayer]
) -> SVDScaleShiftConfig:
    """The config of a combined adapter: all layers of all adapters, each at the highest of their ranks.

    Args:
        configs: The adapters' configs.
        adapters: The adapters' names.
        layers: The tuned layers, by name in the model.

    Returns:
        A config without nonlinearity (see the module's docstring).

    Warns:
        UserWarning: if an adapter has fully trained modules or tokens, which are not combined.
    """
    rank_pattern: dict[str, int | float] = {
        f"^{re.escape(_target_name(name, layer))}": max(layer.rank.get(adapter, 0) for adapter in adapters)
        for name, layer in layers.items()
    }
    targets = sorted(
        {re.escape(_target_name(name, layer)) for name, layer in layers.items() if _is_module_target(layer)}
    )
    if any(config.modules_to_save or config.trainable_token_indices for config in configs):
        message = "Fully trained modules and tokens (`modules_to_save`, `trainable_token_indices`) are not combined."
        warnings.warn(message, stacklevel=3)
    return replace(
        configs[0],
        # A regular expression, because it must match whole names. A list would match endings.
        target_modules="|".join(targets) if targets else [],
        target_parameters=sorted({name for config in configs for name in config.target_parameters or []}) or None,
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
        rank=None,
        rank_pattern=rank_pattern,
        scale=True,
        shift=True,
        nonlinearity="none",
        bias="none",
        init_weights=True,
        fingerprints=None,
    )


def _target_name(layer_name: str, layer: SVDScaleShiftLayer) -> str:
    """The name of the tuned module, or of the tuned parameter, in the base model."""
    name = layer_name.replace(".base_layer", "")
    return name if _is_module_target(layer) else f"{name}.{layer.parameter_name}"


def _is_module_target(layer: SVDScaleShiftLayer) -> bool:
    """Whether the target is a module, as opposed to a bare parameter."""
    return not isinstance(layer, ParamWrapper) or isinstance(layer.get_base_layer(), nn.MultiheadAttention)
