"""Sums of adapters. Over one basis they are sums of vectors, so they are exact.

An adapter changes W by U diag(delta) Vᵀ with delta = relu(A * S + B) - S. For weights w, the sum of adapters is the
adapter of sum(w * delta), and A = 1, B = sum(w * delta) without a ReLU holds that exactly. Only delta is linear: where
the ReLU of an adapter is at zero, doubling its A and B does not double its delta, and where the sum turns a singular
value negative, a ReLU would cut it off. So the sum has none.
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


def combine_changes(
    changes: list[Tensor],
    weights: Tensor,
    combination_type: str,
    density: float,
    majority_sign_method: Literal["total", "frequency"],
) -> Tensor:
    """The weighted combination of several adapters' changes of one layer's singular values.

    Shapes: changes (r,) each, weights (len(changes),); returns (r,).
    """
    if combination_type == "linear":
        return task_arithmetic(changes, weights)
    if combination_type == "magnitude_prune":
        return magnitude_prune(changes, weights, density)
    if combination_type == "dare_linear":
        return dare_linear(changes, weights, density)
    combine = ties if combination_type == "ties" else dare_ties
    return combine(changes, weights, density, majority_sign_method)


def check_combination(combination_type: str, density: float | None, majority_sign_method: str) -> None:
    """Raises a ValueError if there is no such combination, or if what it needs is missing or cannot be."""
    if combination_type not in COMBINATIONS:
        raise ValueError(f"`combination_type` is {combination_type!r}; it can be {', '.join(COMBINATIONS)}.")
    if combination_type != "linear" and density is None:
        raise ValueError(f"combination_type {combination_type!r} needs a `density` between 0 and 1.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"`density` is {density}; it can be above 0 and up to 1.")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"`majority_sign_method` is {majority_sign_method!r}; it can be total, frequency.")


def count_shared_modules_to_save(model: nn.Module, adapters: list[str]) -> int:
    """How many modules more than one of the adapters has a copy of, trained whole."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return sum(len(set(adapters) & set(wrapper.modules_to_save)) > 1 for wrapper in wrappers)


def config_of_combination(
    configs: list[SVDScaleShiftConfig], adapters: list[str], layers: dict[str, SVDScaleShiftLayer]
) -> SVDScaleShiftConfig:
    """The config of an adapter that tunes all that one of ``adapters`` does, at the highest rank that one of them has.

    Args:
        configs: The adapters' configs.
        adapters: Their names.
        layers: The layers that they tune, by name in the model.
    """
    rank_pattern: dict[str, int | float] = {
        f"^{re.escape(_name_of_target(name, layer))}": max(layer.rank.get(adapter, 0) for adapter in adapters)
        for name, layer in layers.items()
    }
    targets = sorted({re.escape(_name_of_target(name, layer)) for name, layer in layers.items() if _is_module(layer)})
    if any(config.modules_to_save or config.trainable_token_indices for config in configs):
        message = "Modules and tokens that the adapters have trained whole take no part in their combination."
        warnings.warn(message, stacklevel=3)
    return replace(
        configs[0],
        # As a regular expression, which has to match whole names where a list matches their ends.
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


def _name_of_target(layer_name: str, layer: SVDScaleShiftLayer) -> str:
    """The name of a layer's module before wrappers were put around it; of the parameter, if that is the target."""
    name = layer_name.replace(".base_layer", "")
    return name if _is_module(layer) else f"{name}.{layer.parameter_name}"


def _is_module(layer: SVDScaleShiftLayer) -> bool:
    """Whether the layer stands for a module that was targeted, and not for a bare parameter of one."""
    return not isinstance(layer, ParamWrapper) or isinstance(layer.get_base_layer(), nn.MultiheadAttention)
