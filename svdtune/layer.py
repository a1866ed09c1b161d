"""The layers that stand in for a model's own: adapters by name, forward, merge and unmerge."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from svdtune.config import SVDScaleShiftConfig
from svdtune.functional import factored_conv2d, factored_linear, transform_singular_values, weight_change
from svdtune.spectrum import Spectrum


class SVDScaleShiftLayer(nn.Module, BaseTunerLayer):
    """A frozen layer of which named adapters scale and shift the singular values.

    A subclass says how its weight is a batch of matrices (`weight_matrices`) and how their factors are applied
    (`adapted_forward`). Several active adapters add their changes of the singular values.

    Attributes:
        base_layer: The layer as it was.
        spectrum: U, S, Vᵀ of its weight, decomposed once and shared by all adapters.
        svd_scale_shift_scale: A of each adapter, (r,).
        svd_scale_shift_shift: B of each adapter, (r,), in units of the singular values.

    Raises:
        ValueError: if the weight has no values yet (meta device), or values that are not finite.
    """

    adapter_layer_names = ("svd_scale_shift_scale", "svd_scale_shift_shift")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SVDScaleShiftConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = self.features()
        self.spectrum = Spectrum(self._checked_weight_matrices())
        self.svd_scale_shift_scale = nn.ParameterDict()
        self.svd_scale_shift_shift = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._weight_before_merge: Tensor | None = None
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SVDScaleShiftConfig) -> None:
        """Adds an adapter, or resets the one of that name."""
        rank = self.spectrum.singular_values.numel()
        scale, shift = torch.ones(rank), torch.zeros(rank)
        if not config.init_weights:
            scale += 0.1 * torch.randn(rank)
            shift += 0.01 * torch.randn(rank)
        self.svd_scale_shift_scale[adapter_name] = nn.Parameter(scale)
        self.svd_scale_shift_shift[adapter_name] = nn.Parameter(shift)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def features(self) -> tuple[int, int]:
        """How many features, or channels, go in and come out."""
        raise NotImplementedError

    def weight_matrices(self, weight: Tensor) -> Tensor:
        """The weight as matrices to decompose, (g, out, in)."""
        raise NotImplementedError

    def adapted_forward(self, x: Tensor, values: Tensor) -> Tensor:
        """The layer's output with ``values`` (g * r,) in place of its singular values."""
        raise NotImplementedError

    def change_of_singular_values(self, adapter_name: str) -> Tensor:
        """relu(A * S + B) - S of one adapter, (g * r,), in float32 or better."""
        dtype = torch.promote_types(self.spectrum.singular_values.dtype, torch.float32)
        singular_values = self.spectrum.singular_values.to(dtype)
        scale = self.svd_scale_shift_scale[adapter_name].to(dtype)
        shift = self.svd_scale_shift_shift[adapter_name].to(dtype)
        return transform_singular_values(singular_values, scale, shift) - singular_values

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """W' - W of one adapter, in the shape of the base weight and in float32 or better."""
        change = weight_change(self.spectrum.left, self.change_of_singular_values(adapter_name), self.spectrum.right)
        return change.reshape(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        adapters = [name for name in self.active_adapters if name in self.svd_scale_shift_scale]
        if self.merged or not adapters:
            return self.base_layer(x)

        values = self.spectrum.singular_values
        for adapter_name in adapters:
            values = values + self.change_of_singular_values(adapter_name)
        return self.adapted_forward(x, values)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' changes to the base weight, which is kept aside for `unmerge`.

        Args:
            safe_merge: Whether to refuse, and leave the layer as it was, when the result is not finite.
            adapter_names: The adapters to merge; the active ones if None.

        Raises:
            ValueError: with ``safe_merge``, if the merged weight is not finite.
        """
        adapter_names = [
            name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.svd_scale_shift_scale
        ]
        if not adapter_names:
            return
        original = self.weight.data if self._weight_before_merge is None else self._weight_before_merge
        change = torch.stack([self.get_delta_weight(name) for name in self.merged_adapters + adapter_names]).sum(0)
        merged = (original.to(change.dtype) + change).to(original.dtype)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
            )
        self._weight_before_merge = original
        self.weight.data = merged
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Puts the base weight back, every bit of it."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.weight.data = self._weight_before_merge.to(device=self.weight.device, dtype=self.weight.dtype)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves A and B, and keeps them in float32 or better whatever the dtype of the base weight.

        PEFT casts them to that dtype and back again, which rounds what was learned to bfloat16's three digits when an
        adapter is loaded with ``low_cpu_mem_usage``, and marks inactive adapters as trainable.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.cast_adapter(adapter_name, dtype, device or self.weight.device)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Casts and moves A and B of an adapter in place; on the meta device they wait for a checkpoint."""
        for parameters in (self.svd_scale_shift_scale, self.svd_scale_shift_shift):
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(device, dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Decomposes again where a state dict brings another base weight."""
        weight = state_dict.get(f"{prefix}base_layer.weight")
        if weight is not None and weight.shape == self.weight.shape:
            weight = weight.to(self.weight)
            if not torch.equal(weight, self.weight):
                if self.merged:
                    raise ValueError(
                        f"{prefix} cannot load another base weight while merged; unmerge_adapter() first."
                    )
                self.spectrum = Spectrum(self.weight_matrices(weight))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _checked_weight_matrices(self) -> Tensor:
        weight = self.weight.detach()
        if weight.is_meta:
            raise ValueError("its weight is on the meta device. Load the base model before adding the adapter.")
        if not weight.isfinite().all():
            raise ValueError("its weight holds NaN or infinite values, so it has no singular values.")
        return self.weight_matrices(weight)

    def __repr__(self) -> str:
        return "svdtune." + super().__repr__()


class Linear(SVDScaleShiftLayer):
    """`nn.Linear`, its weight one matrix (1, out, in)."""

    def features(self) -> tuple[int, int]:
        linear = cast(nn.Linear, self.get_base_layer())
        return linear.in_features, linear.out_features

    def weight_matrices(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0)

    def adapted_forward(self, x: Tensor, values: Tensor) -> Tensor:
        spectrum = self.spectrum
        return factored_linear(x, spectrum.left[0], values, spectrum.right[0], self.bias)


class Conv2d(SVDScaleShiftLayer):
    """`nn.Conv2d`, its weight one matrix a group, (g, out/g, in/g * kh * kw)."""

    def features(self) -> tuple[int, int]:
        convolution = cast(nn.Conv2d, self.get_base_layer())
        return convolution.in_channels, convolution.out_channels

    def weight_matrices(self, weight: Tensor) -> Tensor:
        groups = cast(nn.Conv2d, self.get_base_layer()).groups
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def adapted_forward(self, x: Tensor, values: Tensor) -> Tensor:
        spectrum, convolution = self.spectrum, cast(nn.Conv2d, self.get_base_layer())
        return factored_conv2d(x, spectrum.left, values, spectrum.right, self.bias, convolution)


LAYER_TYPES: dict[type[nn.Module], type[SVDScaleShiftLayer]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
