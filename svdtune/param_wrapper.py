"""A module of which a bare parameter is tuned: fused experts, `nn.MultiheadAttention`."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from svdtune.config import SVDScaleShiftConfig
from svdtune.forms import ONE_SIDED_U, ONE_SIDED_V, REBUILT
from svdtune.layer import SVDScaleShiftLayer

# A lock per module whose parameters are replaced while it runs. No attributes: locks cannot be copied or pickled.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_guard_of_locks = threading.Lock()


class ParamWrapper(SVDScaleShiftLayer):
    """A module that reads one of its parameters itself, such as fused experts or `nn.MultiheadAttention`.

    While the module runs, W' = W + U diag(delta) Vᵀ replaces the parameter: exactly W at the start. W' is built at
    every call, and one thread at a time runs the module. If several parameters of a module are tuned, their wrappers
    enclose one another. PEFT recognises wrappers of parameters by this class's name.

    Args:
        parameter_name: The parameter, (out, in) or (g, out, in), by its name in the innermost module.
        groups: How many matrices a two-dimensional parameter stacks on one another.
    """

    # All build W'. Both sides make it in one product; one side needs a product with W more, and is taken on demand.
    forms = (REBUILT, ONE_SIDED_V, ONE_SIDED_U)

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
        return matrices.reshape(self._parameter().shape)

    @property
    def weight(self) -> Tensor:
        """The module's weight; W' if that is the parameter."""
        return super().weight if self.parameter_name == "weight" else cast(Tensor, self.base_layer.weight)

    def get_base_weight(self) -> Tensor:
        return self._parameter().data

    def _parameter(self) -> nn.Parameter:
        # As an attribute and not as a parameter, since FSDP holds it as a plain tensor.
        return operator.attrgetter(self.parameter_name)(self.get_base_layer())

    @property
    def _name_of_weight(self) -> str:
        return self.parameter_name

    def _set_parameter(self, parameter: nn.Parameter) -> None:
        path, _, name = self.parameter_name.rpartition(".")
        setattr(self.get_base_layer().get_submodule(path), name, parameter)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None and any(self.has_adapter(name) for name in adapter_names):
            raise ValueError(f"svdtune.ParamWrapper of {self.parameter_name} does not support mixed adapter batches.")
        if self.disable_adapters and self.merged:
            self.unmerge()
        untuned = self.disable_adapters or self.merged or adapter_names is not None
        with self._one_thread():
            if not untuned:
                self._follow_weight()
            delta = None if untuned else self._delta_of_active_adapters()
            if delta is None:
                return self.base_layer(*args, **kwargs)
            with self._parameter_reads(self.changed_weight(delta)):
                return self.base_layer(*args, **kwargs)

    def changed_weight(self, delta: Tensor) -> Tensor:
        with self._one_thread():
            return super().changed_weight(delta)

    def _one_thread(self) -> threading.RLock | nullcontext[None]:
        """Keeps other threads from reading W' while the module runs in this thread."""
        if torch.compiler.is_compiling():
            return nullcontext()
        with _guard_of_locks:
            return _locks.setdefault(self.get_base_layer(), threading.RLock())

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The innermost module; with ``merge``, the adapters of all wrappers around it are merged into it."""
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
        # Python finds an instance's attributes before parameters. FSDP uses that too: its tensor is put back.
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
        """The wrapped module's attributes, for other modules that read them; W' for the parameter."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "parameter_name"):
                raise
            return super().weight if name == self.parameter_name else getattr(self.base_layer, name)
