"""How a merged weight takes the place of the base weight, and how the base weight comes back, every bit of it.

There are two ways, each an object that a tuned layer holds and that keeps what was replaced: `PlainMerge` replaces the
parameter, `QuantizedMerge` the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from svdtune.float8 import readable


class MergeableLayer(Protocol):
    """What merging needs of a tuned layer."""

    base_layer: nn.Module
    training: bool

    def get_base_weight(self) -> Tensor: ...
    def set_base_weight(self, weight: Tensor) -> None: ...
    def _parameter(self) -> nn.Parameter: ...
    def _set_parameter(self, parameter: nn.Parameter) -> None: ...


class PlainMerge:
    """Merges into a weight that is not quantised, by another parameter in its place.

    The parameter itself is left alone, since other layers may share it.
    """

    def __init__(self) -> None:
        self._original: nn.Parameter | None = None

    def do(self, layer: MergeableLayer, merged: Tensor) -> None:
        """Puts the merged weight in place of the present one, and keeps the original if none is kept yet."""
        if self._original is None:
            self._original = layer._parameter()
        layer._set_parameter(nn.Parameter(merged, self._original.requires_grad))

    def undo(self, layer: MergeableLayer) -> None:
        """Puts the original back, on the device and in the dtype that the layer has now."""
        original = self._kept()
        original.data = original.data.to(layer._parameter())
        layer._set_parameter(original)
        self._original = None

    def original(self, layer: MergeableLayer) -> Tensor:
        """The weight as it was before merging."""
        return readable(self._kept().detach())

    def moved(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """Follows a move or cast of a merged layer; `undo` does this for a parameter."""

    def _kept(self) -> nn.Parameter:
        assert self._original is not None, "nothing is merged"
        return self._original


class QuantizedMerge:
    """Merges into a quantised weight, by another layer in place of the base layer.

    To quantise the original weight again may give other codes, so the whole layer is kept. It is out of the module
    tree meanwhile: no state dict holds it.

    Args:
        backend: PEFT's access to the quantised weight.
    """

    def __init__(self, backend: QuantizationBackend) -> None:
        self._backend = backend
        self._original: Any = None

    def do(self, layer: MergeableLayer, merged: Tensor) -> None:
        """Quantises the merged weight into a copy of the base layer, and keeps the original if none is kept yet."""
        if self._original is None:
            self._original = layer.base_layer
        layer.base_layer = copy.deepcopy(self._original)
        layer.set_base_weight(merged)
        # PEFT makes a new HQQ layer, without the bias.
        layer.base_layer.bias = self._original.bias

    def undo(self, layer: MergeableLayer) -> None:
        """Puts the original layer back, in the mode that the layer is in now."""
        layer.base_layer = self._original.train(layer.training)
        self._original = None

    def original(self, layer: MergeableLayer) -> Tensor:
        """The weight as it was before merging, in floating point."""
        return self._backend.get_base_weight(self._original).detach()

    def moved(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """Moves or casts the layer that is kept, which the module tree does not reach."""
        self._original._apply(fn, recurse)


def merged_weight(weight: Tensor, changes: list[Tensor], like: Tensor) -> Tensor:
    """``weight`` plus all ``changes`` of it, in the dtype and on the device of ``like``.

    The sum is in the dtype of the changes, which is float32 or better.
    """
    change = torch.stack(changes).sum(0)
    return (weight.to(change) + change).to(like)
