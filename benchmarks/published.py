"""The baseline: the layer that the paper's authors published, which rebuilds its weight at each call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RebuiltLinear(nn.Module):
    """A linear layer that trains A and B of W' = U diag(relu(A * S + B)) Vᵀ, and computes x W'ᵀ."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        left, singular_values, right = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
        self.register_buffer("left", left.to(linear.weight))
        self.register_buffer("singular_values", singular_values.to(linear.weight))
        self.register_buffer("right", right.to(linear.weight))
        self.scale = nn.Parameter(torch.ones_like(self.singular_values))
        self.shift = nn.Parameter(torch.zeros_like(self.singular_values))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        values = F.relu(self.scale * self.singular_values + self.shift)
        return F.linear(x, self.left @ torch.diag(values) @ self.right, self.bias)


def with_rebuilt_layers(model: nn.Module, targets: list[str]) -> nn.Module:
    """Freezes the model, and replaces every linear layer whose name ends in one of ``targets``."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            model.set_submodule(name, RebuiltLinear(module))
    return model
