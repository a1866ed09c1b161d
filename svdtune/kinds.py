"""The kinds of layers that can be tuned: how each one's weight is a batch of matrices, and how it multiplies."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdtune.config import SVDScaleShiftConfig
from svdtune.functional import scaled_convolution, scaled_embedding, scaled_linear, weight_change
from svdtune.layer import SVDScaleShiftLayer


class Linear(SVDScaleShiftLayer):
    """`nn.Linear` or a quantised kin of it, its weight one matrix (1, out, in)."""

    def product(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return scaled_linear(x, self.spectrum.left[0], values, self.spectrum.right[0], bias)

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

    def product(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return scaled_convolution(x, self.spectrum.left, values, self.spectrum.right, bias, self._convolution)

    @property
    def _convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())


class Embedding(SVDScaleShiftLayer):
    """`nn.Embedding`, its weight one matrix (1, rows, features)."""

    def features(self, matrices: Tensor) -> tuple[int, int]:
        return matrices.shape[1], matrices.shape[2]

    def product(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        result = scaled_embedding(x, self.spectrum.left[0], values, self.spectrum.right[0])
        scale = self._get_embed_scale()  # some models' embeddings multiply what they look up
        return result if scale is None else result * scale.to(result.dtype)


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
        change = None if untuned else self._change_of_active_adapters()
        if change is None:
            return self.base_layer(*args, **kwargs)
        weight = self.weight
        difference = self.from_matrices(weight_change(self.spectrum.left, change, self.spectrum.right))
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
