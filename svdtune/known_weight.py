"""Notices that a weight is no longer the one that was decomposed: DDP, for one, sends that of process 0 to all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The same numbers on another device or in another order differ by that many roundings.
ROUNDINGS = 64


class KnownWeight:
    """What a weight answered when it was decomposed.

    Looking whether it was written to since costs nothing; only then are its numbers looked at. Where FSDP puts it
    together at every step, in a tensor that is no parameter, they are looked at once.

    Args:
        weight: The weight, of any shape.
    """

    def __init__(self, weight: Tensor) -> None:
        self._version = _version_of(weight)
        self._answer = _answer_of(weight)
        self._is_settled = False

    def is_another(self, weight: Tensor) -> bool:
        """Whether ``weight`` holds other numbers than those that are known, but for rounding to its dtype."""
        version = _version_of(weight)
        if version == self._version or weight.is_meta or self._answer is None or self._is_settled:
            return False
        self._version, answer = version, _answer_of(weight)
        self._is_settled = not isinstance(weight, nn.Parameter)
        if answer is None or answer.shape != self._answer.shape:
            return False
        tolerance = ROUNDINGS * torch.finfo(weight.dtype).eps * self._answer.norm()
        return bool((answer - self._answer).norm() > tolerance)


def _version_of(weight: Tensor) -> int | None:
    """How often it was written to, where torch counts that."""
    return None if weight.is_inference() else weight._version


@torch.no_grad()
def _answer_of(weight: Tensor) -> Tensor | None:
    """Fixed products of the rows, (rows,), on the CPU; None where there are no numbers to be read."""
    if (
        weight.is_meta
        or not weight.is_floating_point()
        or weight.element_size() == 1
        or hasattr(weight, "full_tensor")
    ):
        return None
    rows = weight.detach().flatten(1)
    probe = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float32).cos()
    with torch.autocast(rows.device.type, enabled=False):
        return (rows.float() @ probe).cpu()
