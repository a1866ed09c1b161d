"""Learning rates and weight decay for what an adapter trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from svdtune.learned import LearnedVector


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    value_rate: float = 5.0,
    undecayed: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """What learns in a model, as groups for an optimizer of torch.

    a and B have a rate of their own: their gradients change sign from batch to batch, so that Adam, at a rate that
    suits a matrix, leaves most singular values within a few per cent of where they were. Weight decay pulls them
    towards the pretrained weight, as it does LoRA's matrices. Vectors (biases, norms), embeddings and trained tokens
    do not decay: for them zero means nothing.

    Args:
        model: A model with an adapter; what does not require gradients is left out.
        lr: The learning rate of what is trained whole, such as a new head.
        weight_decay: Of a and B, and of matrices that are trained whole.
        value_rate: The rate of a and B, as a multiple of ``lr``.
        undecayed: More parameters that do not decay.

    Returns:
        Up to three groups with "params", "lr" and "weight_decay": a and B, what decays, and what does not.

    Raises:
        ValueError: if a rate is not above zero, the decay is below zero, or nothing learns.
    """
    for name, number, fits in (
        ("lr", lr, lr > 0),
        ("value_rate", value_rate, value_rate > 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
    ):
        if not fits:
            raise ValueError(f"`{name}` is {number}; it must be {'zero or ' * (name == 'weight_decay')}above zero.")
    kept = {id(parameter) for parameter in undecayed} | _without_a_zero(model)
    values = {id(module.weight) for module in model.modules() if isinstance(module, LearnedVector)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_value = id(parameter) in values
            decays = id(parameter) not in kept and (is_value or parameter.ndim >= 2)
            groups.setdefault((is_value, decays), []).append(parameter)
    if not groups:
        raise ValueError("Nothing learns in this model: no parameter requires a gradient.")
    return [
        {
            "params": groups[is_value, decays],
            "lr": value_rate * lr if is_value else lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for is_value, decays in sorted(groups, reverse=True)
    ]


def _without_a_zero(model: nn.Module) -> set[int]:
    """The ids of rows of embeddings, trained whole or token by token."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.Embedding)
    } | {id(parameter) for name, parameter in model.named_parameters() if ".trainable_tokens_delta." in f".{name}"}
