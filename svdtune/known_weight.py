"""Notices that a weight is no longer the one that was decomposed: DDP, for example, sends process 0's to all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svdtune.float8 import is_float8

# Relative to a row's norm: how much its products may differ where they are summed in another order.
TOLERANCE = 1e-5


class KnownWeight:
    """The state and a few products of a weight, taken when it was decomposed.

    To see whether it was replaced or written to costs nothing; only then are its numbers compared. FSDP puts the
    weight together at every step, in a new tensor that is no parameter, so there they are compared once.

    Args:
        weight: The weight, of any shape.
    """

    def __init__(self, weight: Tensor) -> None:
        self._state = _state_of(weight)
        self._dtype = weight.dtype
        self._products = _products_of(weight)
        self._is_settled = False

    def is_another(self, weight: Tensor) -> bool:
        """Whether the numbers of ``weight`` are others than the known ones, apart from rounding to another dtype."""
        state = _state_of(weight)
        if state == self._state or weight.is_meta or self._products is None or self._is_settled:
            return False
        products = _products_of(weight)
        if products is not None and products.shape == self._products.shape:
            tolerance = TOLERANCE if weight.dtype == self._dtype else 4 * torch.finfo(weight.dtype).eps
            if ((products - self._products).abs() > tolerance * self._products[0]).any():
                return True
        self._state, self._is_settled = state, not isinstance(weight, nn.Parameter)
        return False


def _state_of(weight: Tensor) -> tuple[int, int, int | None]:
    """The tensor's identity, its address, and how often it was written to, if torch counts that."""
    place = weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) and not weight.is_meta else 0
    return id(weight), place, None if weight.is_inference() else weight._version


@torch.no_grad()
def _products_of(weight: Tensor) -> Tensor | None:
    """The rows' norms and products with two fixed vectors, (3, rows), on the CPU; None if it has no numbers here."""
    if weight.is_meta or not weight.is_floating_point() or is_float8(weight) or hasattr(weight, "full_tensor"):
        return None
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.detach().flatten(1).float()
        angles = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float32)
        return torch.stack([rows.norm(dim=1), rows @ angles.cos(), rows @ angles.sin()]).cpu()
