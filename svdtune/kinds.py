"""The kinds of layers that can be tuned: how each one's weight is a batch of matrices, and how it multiplies."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune.config import SVDScaleShiftConfig
from svdtune.functional import (
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
            result = corrected(y, F.linear(self._like_factors(y), left.mT, of_bias), relative, left.mT)
            if spectrum.tail:
                of_x = F.linear(self._like_factors(x), right)
                result = corrected(result, of_x, of_tail, left[:, divided:].mT)
            return result
        coordinates = F.linear(self._like_factors(x), right)
        y = self.base_layer(corrected(x, coordinates, relative, right) if divided else x, *args, **kwargs)
        return corrected(y, coordinates[..., divided:], of_tail, left.mT) if spectrum.tail else y

    @property
    def _bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.get_base_layer(), "bias", None))

    def _weight_at_hand(self) -> Tensor | None:
        """The base weight as a matrix, unless FSDP or DeepSpeed have it in pieces."""
        weight = self.weight
        in_pieces = hasattr(weight, "full_tensor") or weight.numel() != self.out_features * self.in_features
        return None if in_pieces or weight.dtype != self.spectrum.dtype else self.to_matrices(weight.detach())[0]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class LinearConv1D(Linear):
    """transformers' Conv1D, a linear layer that holds its weight as (in, out).

    (By the name of its class, PEFT knows it for a linear layer where "all-linear" is asked for again.)
    """

    def to_matrices(self, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        return matrices[0].mT

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class Convolution(SVDScaleShiftLayer):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, its weight one matrix a group, (g, out/g, in/g * kh * kw)."""

    def features(self, matrices: Tensor) -> tuple[int, int]:
        return self._convolution.in_channels, self._convolution.out_channels

    def to_matrices(self, weight: Tensor) -> Tensor:
        groups = self._convolution.groups
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        return matrices.reshape(self.weight.shape)

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
            y = corrected(y, F.linear(self._like_factors(y), right), change * spectrum.reciprocals, right)
        if spectrum.tail:
            coordinates = F.embedding(x, left)
            scale = self._get_embed_scale()  # some models' embeddings multiply what they look up
            coordinates = coordinates if scale is None else coordinates * scale.to(coordinates.dtype)
            y = corrected(y, coordinates, spectrum.of_tail(change), right[divided:])
        return y


class ParamWrapper(SVDScaleShiftLayer):
    """A module that reads one of its parameters itself, such as fused experts or `nn.MultiheadAttention`.

    The parameter is replaced by W' = W + U diag(delta) Vᵀ while the module runs: exactly W at the start, but built at
    every call. Several parameters of a module are tuned by wrappers around one another. (PEFT knows wrappers of
    parameters by this class's name.)

    Args:
        parameter_name: The parameter, (out, in) or (g, out, in), by its name in the innermost module.
        groups: How many matrices a two-dimensional parameter stacks on one another.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        parameter_name: str,
        adapter_name: str,
        config: SVDScaleShiftConfig,
        rank_pattern_key: str | None = None,
        quantization_backend: QuantizationBackend | None = None,
        groups: int = 1,
    ) -> None:
        self.parameter_name = parameter_name
        self.groups = groups
        super().__init__(base_layer, adapter_name, config, rank_pattern_key, quantization_backend)

    def to_matrices(self, weight: Tensor) -> Tensor:
        if weight.ndim not in (2, 3):
            raise ValueError(
                f"its parameter {self.parameter_name} has {weight.ndim} dimensions, and not two or three."
            )
        return weight if weight.ndim == 3 else weight.unflatten(0, (self.groups, -1))

    def from_matrices(self, matrices: Tensor) -> Tensor:
        return matrices.reshape(self.weight.shape)

    def sides(self, matrices: Tensor, rank: int, one_sided: bool) -> Sides:
        # W' is built from both in one product.
        return self.smaller_side(matrices) if one_sided else "both"

    @property
    def weight(self) -> Tensor:
        """The parameter as the module holds it."""
        # FSDP holds it as a plain tensor, so it is looked up as an attribute and not as a parameter.
        return operator.attrgetter(self.parameter_name)(self.get_base_layer())

    def get_base_weight(self) -> Tensor:
        return self.weight.data

    def _set_parameter(self, parameter: nn.Parameter) -> None:
        path, _, name = self.parameter_name.rpartition(".")
        setattr(self.get_base_layer().get_submodule(path), name, parameter)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None and any(self.has_adapter(name) for name in adapter_names):
            raise ValueError(f"svdtune.ParamWrapper of {self.parameter_name} does not support mixed adapter batches.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        untuned = self.disable_adapters or self.merged or adapter_names is not None
        if not untuned:
            self._follow_weight()
        change = None if untuned else self._change_of_active_adapters()
        if change is None:
            return self.base_layer(*args, **kwargs)
        weight = self.weight
        difference = self.from_matrices(self.spectrum.change_of(self.to_matrices(weight), change))
        with self._parameter_reads(weight.to(difference.dtype).add(difference).to(weight.dtype)):
            return self.base_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The innermost module, with what all wrappers around it have learned if ``merge``."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # Answers nn.TransformerEncoderLayer, which in eval mode would read the attention's weights without calling it.
        return False

    @contextmanager
    def _parameter_reads(self, tensor: Tensor) -> Iterator[None]:
        """While open, the module that holds the parameter finds ``tensor`` under its name."""
        path, _, name = self.parameter_name.rpartition(".")
        attributes = self.get_base_layer().get_submodule(path).__dict__
        # Attributes go before parameters. FSDP has made use of that itself, so what it put there comes back.
        hidden = attributes.get(name)
        attributes[name] = tensor
        try:
            yield
        finally:
            del attributes[name]
            if hidden is not None:
                attributes[name] = hidden

    def _weight_key(self, prefix: str) -> str:
        path, layer = self.parameter_name, self.base_layer
        while isinstance(layer, ParamWrapper):
            path, layer = f"base_layer.{path}", layer.base_layer
        return f"{prefix}base_layer.{path}"

    def __getattr__(self, name: str) -> Any:
        """Other modules may ask the wrapped one for its attributes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


LAYER_KINDS: dict[type[nn.Module], type[SVDScaleShiftLayer]] = {
    nn.Linear: Linear,
    Conv1D: LinearConv1D,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.Embedding: Embedding,
}
