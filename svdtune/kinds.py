"""The kinds of layers that can be tuned: how each one's weight is a batch of matrices, and how it multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune.functional import (
    coordinates_of,
    corrected,
    corrected_channels,
    rebuilding_costs_less,
    rebuilt_linear,
    scaled_convolution,
    scaled_linear,
)
from svdtune.layer import SVDScaleShiftLayer
from svdtune.spectrum import Sides


class Linear(SVDScaleShiftLayer):
    """`nn.Linear` or a quantised kin of it, its weight one matrix (1, out, in)."""

    stock_forwards: tuple[Callable[..., Any], ...] = (nn.Linear.forward,)

    def whole_product(self, x: Tensor, change: Tensor) -> Tensor:
        left, right, bias = self.spectrum.left[0], self.spectrum.right[0], self._bias
        rows, weight = x.numel() // self.in_features, self._weight_at_hand()
        costs_less = rebuilding_costs_less(rows, self.out_features, self.in_features, torch.is_grad_enabled())
        if costs_less and weight is not None and change.ndim == 1:
            return rebuilt_linear(x, weight, left, change, right, bias)
        return scaled_linear(x, left, self.spectrum.singular_values + change, right, bias)

    def changed_product(self, x: Tensor, change: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        spectrum = self.spectrum
        left, right = spectrum.left[0], spectrum.right[0]
        relative, of_tail = change * spectrum.reciprocals, spectrum.of_tail(change)
        divided = spectrum.rank - spectrum.tail
        if spectrum.sides == "left":
            y = self.base_layer(x, *args, **kwargs)
            of_bias = None if self._bias is None else -(self._bias.to(left.dtype) @ left)
            coordinates = coordinates_of(self._like_factors(y), left.mT, relative, bias=of_bias)
            result = corrected(y, coordinates, relative, left.mT)
            if spectrum.tail:
                of_x = coordinates_of(self._like_factors(x), right, of_tail)
                result = corrected(result, of_x, of_tail, left[:, divided:].mT)
            return result
        coordinates = coordinates_of(self._like_factors(x), right, relative, of_tail)
        y = self.base_layer(corrected(x, coordinates, relative, right) if divided else x, *args, **kwargs)
        if not spectrum.tail:
            return y
        return corrected(y, (coordinates[0][..., divided:], coordinates[1]), of_tail, left.mT)

    @property
    def _bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.get_base_layer(), "bias", None))

    def _weight_at_hand(self) -> Tensor | None:
        """The base weight as a matrix, unless FSDP or DeepSpeed have it in pieces."""
        weight = self._parameter()
        in_pieces = hasattr(weight, "full_tensor") or weight.numel() != self.out_features * self.in_features
        return None if in_pieces or weight.dtype != self.spectrum.dtype else self.to_matrices(weight.detach())[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class LinearConv1D(Linear):
    """transformers' Conv1D, a linear layer that holds its weight as (in, out).

    (By the name of its class, PEFT knows it for a linear layer where "all-linear" is asked for again.)
    """

    stock_forwards = (Conv1D.forward,)

    def to_matrices(self, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        return matrices[0].mT

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class Convolution(SVDScaleShiftLayer):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, its weight one matrix a group, (g, out/g, in/g * kh * kw)."""

    stock_forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def features(self, matrices: Tensor) -> tuple[int, int]:
        return self._convolution.in_channels, self._convolution.out_channels

    def to_matrices(self, weight: Tensor) -> Tensor:
        groups = self._convolution.groups
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        return matrices.reshape(self._parameter().shape)

    def smaller_side(self, matrices: Tensor) -> Sides:
        # On the input's side the vectors are patches, and there is no image that would change them all.
        return "left" if matrices.shape[1] <= matrices.shape[2] else "both"

    def whole_product(self, x: Tensor, change: Tensor) -> Tensor:
        spectrum, bias = self.spectrum, self._convolution.bias
        values = spectrum.singular_values + change
        return scaled_convolution(x, spectrum.left, values, spectrum.right, bias, self._convolution)

    def changed_product(self, x: Tensor, change: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        spectrum, convolution = self.spectrum, self._convolution
        y = self.base_layer(x, *args, **kwargs)
        divided = spectrum.rank - spectrum.tail
        if divided:
            dimensions, relative = len(convolution.kernel_size), change * spectrum.reciprocals
            y = corrected_channels(y, spectrum.left, relative, convolution.bias, dimensions)
        if spectrum.tail:
            left, values = spectrum.left[..., divided:], spectrum.of_tail(change)
            of_tail = scaled_convolution(self._like_factors(x), left, values, spectrum.right, None, convolution)
            y = y + of_tail.to(y.dtype)
        return y

    @property
    def _convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())


class Embedding(SVDScaleShiftLayer):
    """`nn.Embedding`, its weight one matrix (1, rows, features)."""

    def features(self, matrices: Tensor) -> tuple[int, int]:
        return matrices.shape[1], matrices.shape[2]

    def sides(self, matrices: Tensor, rank: int, one_sided: bool) -> Sides:
        # A vocabulary is much longer than its vectors, which makes U as large as the weight.
        return self.smaller_side(matrices)

    def smaller_side(self, matrices: Tensor) -> Sides:
        return "right" if matrices.shape[1] >= matrices.shape[2] else "both"

    def changed_product(self, x: Tensor, change: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        spectrum = self.spectrum
        left, right, divided = spectrum.left[0], spectrum.right[0], spectrum.rank - spectrum.tail
        y = self.base_layer(x, *args, **kwargs)
        if divided:
            relative = change * spectrum.reciprocals
            y = corrected(y, coordinates_of(self._like_factors(y), right, relative), relative, right)
        if spectrum.tail:
            coordinates = F.embedding(x, left)
            scale = self._get_embed_scale()  # some models' embeddings multiply what they look up
            coordinates = coordinates if scale is None else coordinates * scale.to(coordinates.dtype)
            y = corrected(y, (coordinates, None), spectrum.of_tail(change), right[divided:])
        return y


LAYER_KINDS: dict[type[nn.Module], type[SVDScaleShiftLayer]] = {
    nn.Linear: Linear,
    Conv1D: LinearConv1D,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.Embedding: Embedding,
}
