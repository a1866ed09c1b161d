"""Finds modules that a model uses in several places: under several parents, or as twins that share parameters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

# The parent of a module, and the module's name in it.
Place = tuple[nn.Module, str]


def shared_places(model: nn.Module) -> dict[int, list[Place]]:
    """The places of each module with several parents, by the module's id. PEFT finds only the first place."""
    places: dict[int, list[Place]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            places[id(child)].append((parent, name))
    return {key: found for key, found in places.items() if len(found) > 1}


def find_twins(model: nn.Module) -> dict[int, list[tuple[str, Place]]]:
    """The twins of each module, by the module's id: modules of the same class, parameters and settings.

    Example: T5's `shared` and the embeddings of its encoder and decoder.

    Returns:
        For each module with twins, the name and the place of each twin.
    """
    alike: dict[tuple, list[tuple[str, Place, nn.Module]]] = defaultdict(list)
    for prefix, parent in model.named_modules():
        for name, module in parent.named_children():
            if module._parameters and not module._modules and not module._buffers:
                key = (type(module), *((key, id(value)) for key, value in module._parameters.items()))
                alike[key].append((f"{prefix}.{name}".lstrip("."), (parent, name), module))
    twins: dict[int, list[tuple[str, Place]]] = {}
    for group in alike.values():
        for _, _, module in group:
            others = [
                (name, place) for name, place, other in group if other is not module and _behave_alike(module, other)
            ]
            if others:
                twins[id(module)] = others
    return twins


def _behave_alike(one: nn.Module, other: nn.Module) -> bool:
    return _settings(one) == _settings(other) and not any(map(_has_hooks, (one, other)))


def _settings(module: nn.Module) -> dict[str, Any]:
    """The settings of a module that are plain attributes, such as sizes and strides."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "_hf_hook")
