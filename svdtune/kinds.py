"""The kinds of layers that can be tuned: how each weight is a batch of matrices, and the product in each form.

`SVDScaleShiftLayer` documents the methods that a kind defines. In the one-sided forms, the tail is the last singular
values, which are too small to divide by (see `svdtune.spectrum`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune.forms import DELTA, FACTORED, ONE_SIDED_U, ONE_SIDED_V, REBUILT
from svdtune.functional import (
    add_scaled,
    add_scaled_channels,
    project,
    rebuilt_linear,
    scaled_convolution,
    scaled_linear,
)
from svdtune.layer import SVDScaleShiftLayer


class Linear(SVDScaleShiftLayer):
    """`nn.Linear` or a quantised layer of its kind. Its weight is one matrix, (1, out, in)."""

    forms = (FACTORED, REBUILT, ONE_SIDED_V, ONE_SIDED_U, DELTA)
    stock_forwards: tuple[Callable[..., Any], ...] = (nn.Linear.forward,)

    def factored_product(self, x: Tensor, delta: Tensor) -> Tensor:
        spectrum = self.spectrum
        return scaled_linear(x, spectrum.left[0], spectrum.singular_values + delta, spectrum.right[0], self._bias)

    def rebuilt_product(self, x: Tensor, delta: Tensor) -> Tensor:
        weight = self.to_matrices(self._parameter().detach())[0]
        return rebuilt_linear(x, weight, self.spectrum.left[0], delta, self.spectrum.right[0], self._bias)

    def rows_to_rebuild_for(self, x: Tensor, delta: Tensor) -> int | None:
        weight = self._parameter()
        # FSDP and DeepSpeed hold the weight in shards. A row of delta per sample would mean a W' per sample.
        is_sharded = hasattr(weight, "full_tensor") or weight.numel() != self.out_features * self.in_features
        if is_sharded or weight.dtype != self.spectrum.dtype or delta.ndim > 1:
            return None
        return x.numel() // self.in_features

    def right_sided_product(self, x: Tensor, delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # W' x = W (x + V diag(delta / S) Vᵀ x), and U diag(delta) Vᵀ x for the tail, which is too small to divide by.
        spectrum = self.spectrum
        vectors, divided = spectrum.vectors[0], spectrum.rank - spectrum.tail
        relative_delta, tail_delta = delta * spectrum.reciprocals, spectrum.tail_values(delta)
        # Vᵀ x of all values, once: the leading ones change the input, the tail changes the output.
        coordinates, divisor = project(self._like_factors(x), vectors, relative_delta, tail_delta)
        if divided:
            x = add_scaled(x, (coordinates, divisor), relative_delta, vectors)
        y = self.base_layer(x, *args, **kwargs)
        if spectrum.tail:
            y = add_scaled(y, (coordinates[..., divided:], divisor), tail_delta, spectrum.left[0].mT)
        return y

    def left_sided_product(self, x: Tensor, delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # W' x = y + U diag(delta / S) Uᵀ y with y = W x, and U diag(delta) Vᵀ x for the tail.
        spectrum = self.spectrum
        vectors, relative_delta = spectrum.vectors[0], delta * spectrum.reciprocals
        y = self.base_layer(x, *args, **kwargs)
        # The base layer's output includes the bias, which is not to be scaled: Uᵀ W x = Uᵀ (output - bias).
        bias = None if self._bias is None else -(self._bias.to(vectors.dtype) @ vectors.mT)
        coordinates = project(self._like_factors(y), vectors, relative_delta, bias=bias)
        y = add_scaled(y, coordinates, relative_delta, vectors)
        return self.with_delta(y, x, spectrum.tail_values(delta)) if spectrum.tail else y

    def with_delta(self, y: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        coordinates = project(self._like_factors(x), self.spectrum.right[0], delta)
        return add_scaled(y, coordinates, delta, self.spectrum.left[0].mT)

    @property
    def _bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.get_base_layer(), "bias", None))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class LinearConv1D(Linear):
    """transformers' Conv1D, a linear layer that holds its weight as (in, out).

    PEFT looks for this class name: with "all-linear", it adds further adapters to layers of this name too.
    """

    stock_forwards = (Conv1D.forward,)

    def to_matrices(self, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        return matrices[0].mT

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class Convolution(SVDScaleShiftLayer):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`. Its weight is one matrix per group, (g, out/g, in/g * kh * kw)."""

    # Vᵀ projects patches, which overlap: no change of the image would change the patches alike. So there is no
    # one-sided form with V.
    forms = (FACTORED, ONE_SIDED_U, DELTA)
    stock_forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def features(self, matrices: Tensor) -> tuple[int, int]:
        return self._convolution.in_channels, self._convolution.out_channels

    def to_matrices(self, weight: Tensor) -> Tensor:
        groups = self._convolution.groups
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        return matrices.reshape(self._parameter().shape)

    def factored_product(self, x: Tensor, delta: Tensor) -> Tensor:
        spectrum, convolution = self.spectrum, self._convolution
        values = spectrum.singular_values + delta
        return scaled_convolution(x, spectrum.left, values, spectrum.right, convolution.bias, convolution)

    def left_sided_product(self, x: Tensor, delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # At each pixel W' x = y + U diag(delta / S) Uᵀ y with y = W x, and U diag(delta) Vᵀ x for the tail.
        spectrum, convolution = self.spectrum, self._convolution
        y = self.base_layer(x, *args, **kwargs)
        if spectrum.tail < spectrum.rank:
            relative_delta, dimensions = delta * spectrum.reciprocals, len(convolution.kernel_size)
            y = add_scaled_channels(y, spectrum.vectors.mT, relative_delta, convolution.bias, dimensions)
        return self.with_delta(y, x, spectrum.tail_values(delta)) if spectrum.tail else y

    def with_delta(self, y: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        spectrum = self.spectrum
        change = scaled_convolution(
            self._like_factors(x), spectrum.left, delta, spectrum.right, None, self._convolution
        )
        return y + change.to(y.dtype)

    @property
    def _convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())


class Embedding(SVDScaleShiftLayer):
    """`nn.Embedding`. Its weight is one matrix, (1, rows, features), and its output rows of it: uᵀ diag(S) Vᵀ."""

    # One-sided even where all values are tuned: a vocabulary is long, and U would be as large as the weight.
    forms = (ONE_SIDED_V, DELTA)

    def features(self, matrices: Tensor) -> tuple[int, int]:
        return matrices.shape[1], matrices.shape[2]

    def right_sided_product(self, x: Tensor, delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # W' is W + W V diag(delta / S) Vᵀ, so here V changes the output, and U diag(delta) Vᵀ for the tail.
        spectrum = self.spectrum
        y = self.base_layer(x, *args, **kwargs)
        if spectrum.tail < spectrum.rank:
            vectors, relative_delta = spectrum.vectors[0], delta * spectrum.reciprocals
            y = add_scaled(y, project(self._like_factors(y), vectors, relative_delta), relative_delta, vectors)
        return self.with_delta(y, x, spectrum.tail_values(delta)) if spectrum.tail else y

    def with_delta(self, y: Tensor, x: Tensor, delta: Tensor) -> Tensor:
        coordinates = F.embedding(x, self.spectrum.left[0])
        scale = self._get_embed_scale()  # some models' embeddings multiply the rows that they look up
        coordinates = coordinates if scale is None else coordinates * scale.to(coordinates.dtype)
        return add_scaled(y, (coordinates, None), delta, self.spectrum.right[0])


LAYER_KINDS: dict[type[nn.Module], type[SVDScaleShiftLayer]] = {
    nn.Linear: Linear,
    Conv1D: LinearConv1D,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.Embedding: Embedding,
}
