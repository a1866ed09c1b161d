"""Creates the tuned layer that replaces a module, or raises an error that gives the reason."""

from __future__ import annotations

from typing import Any, cast

from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from svdtune.computed_weights import REMEDY as MAKE_PERMANENT
from svdtune.computed_weights import is_computed
from svdtune.kinds import LAYER_KINDS, Linear
from svdtune.layer import SVDScaleShiftLayer
from svdtune.param_wrapper import ParamWrapper
from svdtune.trial import computes_the_same

REMEDY = "Remove it from `target_modules`, or add it to `exclude_modules`."


def new_layer(
    target: nn.Module,
    name: str,
    parameter_name: str | None,
    quantization_options: dict[str, Any],
    **options: Any,
) -> SVDScaleShiftLayer:
    """Creates the tuned layer for a module.

    Args:
        target: The module to replace.
        name: The module's name in the model.
        parameter_name: The bare parameter to tune, or None for the whole module.
        quantization_options: PEFT's options for reading a quantised weight.
        **options: Arguments of every tuned layer, such as the adapter's name and config.

    Returns:
        The tuned layer, with ``target`` as its base layer.

    Raises:
        TypeError: if the module's type is not supported.
        ValueError: if the module's weight cannot be decomposed.
    """
    try:
        backend = resolve_quantization_backend(target, **quantization_options)
        if parameter_name is not None:
            if backend is not None:
                raise TypeError(
                    f"`{name}` cannot be tuned: it is quantised. Name its module in `target_modules` instead."
                )
            _check_weight_is_stored(target, parameter_name, name)
            return ParamWrapper(target, parameter_name, **options)
        if isinstance(target, nn.MultiheadAttention):
            return _tuned_attention(target, name, **options)
        if backend is None:
            return _layer_kind(target, name)(target, **options)
        if not backend.supports_merge:
            raise TypeError(
                f"`{name}` cannot be tuned: a weight quantised by {backend.backend_name} cannot be read back, so it "
                "cannot be decomposed. Quantise the base with bitsandbytes, HQQ or torchao, or not at all."
            )
        _disable_cpu_packing(target)
        return Linear(target, quantization_backend=backend, **options)
    except ValueError as error:
        raise ValueError(f"`{name}` cannot be tuned: {error}") from error


def update_existing_layer(target: nn.Module, parameter_name: str | None, **options: Any) -> bool:
    """Adds an adapter to a layer that is already tuned. Returns False for other modules."""
    if not isinstance(target, SVDScaleShiftLayer):
        return False
    if parameter_name is not None and getattr(target, "parameter_name", None) != parameter_name:
        return False
    target.update_layer(**options)
    if parameter_name is None and isinstance(target, ParamWrapper):
        update_existing_layer(target.base_layer, None, **options)  # the other projection of an attention
    return True


def _tuned_attention(attention: nn.MultiheadAttention, name: str, **options: Any) -> ParamWrapper:
    """Tunes the projections of query, key and value, as three matrices, and the output projection."""
    if attention.in_proj_weight is None:
        raise TypeError(
            f"`{name}` cannot be tuned as a module, since its query, key and value differ in size. Name "
            "`q_proj_weight`, `k_proj_weight` and `v_proj_weight` in `target_parameters` instead."
        )
    for parameter_name in ("in_proj_weight", "out_proj.weight"):
        _check_weight_is_stored(attention, parameter_name, name)
    projection = ParamWrapper(attention, "in_proj_weight", groups=3, **options)
    return ParamWrapper(projection, "out_proj.weight", **options)


def _layer_kind(target: nn.Module, name: str) -> type[SVDScaleShiftLayer]:
    """The class of the tuned layer for a module that is not quantised."""
    for base_type, kind in LAYER_KINDS.items():
        if isinstance(target, base_type):
            _check_supported(target, base_type, name)
            return kind
    supported = ", ".join(base_type.__name__ for base_type in [*LAYER_KINDS, nn.MultiheadAttention])
    raise TypeError(f"`{name}` cannot be tuned: it is {type(target).__name__}, and none of {supported}. {REMEDY}")


def _check_supported(target: nn.Module, base_type: type[nn.Module], name: str) -> None:
    # A subclass with its own forward may compute something other than the product that replaces it.
    own_forward = type(target).forward is not base_type.forward  # type: ignore[comparison-overlap]
    if own_forward and cast(Tensor, target.weight).numel() and not computes_the_same(target, base_type):
        raise TypeError(
            f"`{name}` cannot be tuned: {type(target).__name__} has its own forward, unlike {base_type.__name__}, and "
            f"does not compute the same. {REMEDY}"
        )
    if getattr(target, "max_norm", None) is not None:
        raise TypeError(f"`{name}` cannot be tuned: with `max_norm` it changes its weight at every call. {REMEDY}")
    _check_weight_is_stored(target, "weight", name)
    weight = cast(Tensor, target.weight)
    if not weight.is_floating_point():
        raise TypeError(f"`{name}` cannot be tuned: its weight is {weight.dtype}. {REMEDY}")


def _check_weight_is_stored(target: nn.Module, parameter_name: str, name: str) -> None:
    """Raises an error if a module computes the weight from other parameters, because it may change at any time."""
    if is_computed(target, parameter_name):
        raise TypeError(
            f"`{name}` cannot be tuned: its {parameter_name} is computed from other parameters (weight norm, spectral "
            f"norm, a parametrization or pruning). {MAKE_PERMANENT}"
        )


def _disable_cpu_packing(target: nn.Module) -> None:
    """Prevents bitsandbytes from packing a 4-bit weight at the first evaluation on a CPU with AVX512-BF16.

    PEFT silently reads wrong numbers from the packed format, which also rounds the blocks' scales to bfloat16.

    Raises:
        ValueError: if the weight is already packed.
    """
    if getattr(getattr(getattr(target, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "it was evaluated on this CPU, so bitsandbytes has packed and rounded its 4-bit weight. Load the base "
            "model again, and add the adapter before evaluating it."
        )
    if hasattr(target, "support_avx512bf16_for_cpu"):
        cast(Any, target).support_avx512bf16_for_cpu = False
