"""Learning rates and weight decay of an adapter's parameters."""

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
    """Groups the trainable parameters of a model for a torch optimizer.

    a and B need a higher learning rate than matrices. Their gradients change sign from batch to batch. At a rate that
    suits a matrix, Adam leaves most singular values within a few per cent of their initial values. Weight decay pulls
    a and B towards the pretrained weight, as it does LoRA's matrices. Vectors (biases, norms), embeddings and trained
    tokens get no weight decay, because zero has no special meaning for them.

    Args:
        model: A model with an adapter. Parameters that do not require gradients are skipped.
        lr: Learning rate of fully trained parameters, such as a new head.
        weight_decay: Weight decay of a and B, and of fully trained matrices.
        value_rate: Learning rate of a and B, as a multiple of ``lr``.
        undecayed: Further parameters without weight decay.

    Returns:
        Up to three groups, each a dictionary with "params", "lr" and "weight_decay": a and B, other parameters with
        weight decay, and parameters without.

    Raises:
        ValueError: if a rate is not positive, the weight decay is negative, or no parameter is trainable.
    """
    for name, number, fits in (
        ("lr", lr, lr > 0),
        ("value_rate", value_rate, value_rate > 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
    ):
        if not fits:
            raise ValueError(f"`{name}` is {number}; it must be {'zero or ' * (name == 'weight_decay')}above zero.")
    undecayed_ids = {id(parameter) for parameter in undecayed} | _embedding_parameters(model)
    values = {id(module.weight) for module in model.modules() if isinstance(module, LearnedVector)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_value = id(parameter) in values
            decays = id(parameter) not in undecayed_ids and (is_value or parameter.ndim >= 2)
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


def _embedding_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters of embeddings: whole embeddings and trained token rows."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.Embedding)
    } | {id(parameter) for name, parameter in model.named_parameters() if ".trainable_tokens_delta." in f".{name}"}
