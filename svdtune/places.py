"""Where a module stands in a model: under several parents, or beside twins that are it but for their identity."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

# Of a module: its parent and its name there.
Place = tuple[nn.Module, str]


def places_of_each(model: nn.Module) -> dict[int, list[Place]]:
    """Of modules with several parents, by the module's id: all places. PEFT sees a module under the first alone."""
    places: dict[int, list[Place]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            places[id(child)].append((parent, name))
    return {key: found for key, found in places.items() if len(found) > 1}


def twins_of_each(model: nn.Module) -> dict[int, list[tuple[str, Place]]]:
    """Of modules that hold the very parameters of another of their class, and compute the same: name and place of each
    other one, by the module's id. So T5's `shared` stands beside the embeddings of its encoder and decoder."""
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
                (name, place) for name, place, other in group if other is not module and _act_alike(module, other)
            ]
            if others:
                twins[id(module)] = others
    return twins


def _act_alike(one: nn.Module, other: nn.Module) -> bool:
    return _choices(one) == _choices(other) and not any(map(_is_watched, (one, other)))


def _choices(module: nn.Module) -> dict[str, Any]:
    """Sizes, strides and the like, which a module keeps as plain attributes."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


def _is_watched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "_hf_hook")
