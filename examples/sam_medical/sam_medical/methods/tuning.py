"""What an optimizer needs to know of a tuned model: which values learn, how fast, and which decay."""

from __future__ import annotations

from typing import Any

from torch import nn

import svdtune
from sam_medical.models.backbone import Backbone
from svdtune.learned import LearnedVector


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate: float, value_rate: float
) -> list[dict[str, Any]]:
    """The trainable parameters for an optimizer, see `svdtune.parameter_groups`.

    Only matrices decay, as in all published results: positions mean something where they are.
    """
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    undecayed = [
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, LearnedVector)
        or name.startswith("position_embeddings")  # UNETR's
        or any(backbone.is_position(module, name) for backbone in backbones)
    ]
    return svdtune.parameter_groups(model, learning_rate, weight_decay, value_rate, undecayed)


def count_trainable(model: nn.Module) -> int:
    """How many values learn; of a parameter that is held at zero in places, those that can move."""
    return sum(
        getattr(parameter, "values_that_learn", parameter.numel())
        for parameter in model.parameters()
        if parameter.requires_grad
    )
