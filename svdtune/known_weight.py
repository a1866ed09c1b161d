"""Notices that a weight is no longer the one that was decomposed: DDP, for one, sends that of process 0 to all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svdtune.float8 import is_float8

# Of a row's length: its products may come out differently by that much where they are summed in another order.
TOLERANCE = 1e-5


class KnownWeight:
    """What a weight answered when it was decomposed.

    Looking whether it was replaced or written to since costs nothing; only then are its numbers looked at. Where FSDP
    puts it together at every step, in a tensor that is no parameter, they are looked at once.

    Args:
        weight: The weight, of any shape.
    """

    def __init__(self, weight: Tensor) -> None:
        self._state = _state_of(weight)
        self._dtype = weight.dtype
        self._answer = _answer_of(weight)
        self._is_settled = False

    def is_another(self, weight: Tensor) -> bool:
        """Whether ``weight`` holds other numbers than those that are known, but for rounding to another dtype."""
        state = _state_of(weight)
        if state == self._state or weight.is_meta or self._answer is None or self._is_settled:
            return False
        answer = _answer_of(weight)
        if answer is not None and answer.shape == self._answer.shape:
            tolerance = TOLERANCE if weight.dtype == self._dtype else 4 * torch.finfo(weight.dtype).eps
            if ((answer - self._answer).abs() > tolerance * self._answer[0]).any():
                return True
        self._state, self._is_settled = state, not isinstance(weight, nn.Parameter)
        return False


def _state_of(weight: Tensor) -> tuple[int, int, int | None]:
    """Which tensor it is, where its numbers are, and how often it was written to, where torch counts that."""
    place = weight.data_ptr() if type(weight) in (Tensor, nn.Parameter) and not weight.is_meta else 0
    return id(weight), place, None if weight.is_inference() else weight._version


@torch.no_grad()
def _answer_of(weight: Tensor) -> Tensor | None:
    """Lengths and fixed products of the rows, (3, rows), on the CPU; None where there are no numbers to be read."""
    if weight.is_meta or not weight.is_floating_point() or is_float8(weight) or hasattr(weight, "full_tensor"):
        return None
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.detach().flatten(1).float()
        angles = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float32)
        return torch.stack([rows.norm(dim=1), rows @ angles.cos(), rows @ angles.sin()]).cpu()
