"""What takes the place of a module: the tuned layer of its kind, or an error that says why there is none."""

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

REMEDY = "Take it out of `target_modules`, or name it in `exclude_modules`."


def new_layer(
    target: nn.Module,
    name: str,
    parameter_name: str | None,
    quantization_options: dict[str, Any],
    **options: Any,
) -> SVDScaleShiftLayer:
    """The tuned layer for a module.

    Args:
        target: The module.
        name: Its name in the model.
        parameter_name: Which of its parameters to tune, if it is not the module as a whole.
        quantization_options: What PEFT needs to know to read a quantised weight.
        options: What every tuned layer is made with: adapter name, config and so on.

    Raises:
        TypeError: if modules of its kind cannot be tuned.
        ValueError: if this one's weight cannot be decomposed.
    """
    try:
        backend = resolve_quantization_backend(target, **quantization_options)
        if parameter_name is not None:
            if backend is not None:
                raise TypeError(
                    f"`{name}` cannot be tuned: it is quantised. Name its module in `target_modules` instead."
                )
            _check_holds_its_weight(target, parameter_name, name)
            return ParamWrapper(target, parameter_name, **options)
        if isinstance(target, nn.MultiheadAttention):
            return _tuned_attention(target, name, **options)
        if backend is None:
            return _layer_kind(target, name)(target, **options)
        if not backend.supports_merge:
            raise TypeError(
                f"`{name}` cannot be tuned: a weight quantised by {backend.backend_name} cannot be read back, so it "
                "has no singular values here. Quantise the base with bitsandbytes, HQQ or torchao, or not at all."
            )
        _keep_readable(target)
        return Linear(target, quantization_backend=backend, **options)
    except ValueError as error:
        raise ValueError(f"`{name}` cannot be tuned: {error}") from error


def update_existing_layer(target: nn.Module, parameter_name: str | None, **options: Any) -> bool:
    """Adds the adapter to a layer that is tuned already; False if it is not."""
    if not isinstance(target, SVDScaleShiftLayer):
        return False
    if parameter_name is not None and getattr(target, "parameter_name", None) != parameter_name:
        return False
    target.update_layer(**options)
    if parameter_name is None and isinstance(target, ParamWrapper):
        update_existing_layer(target.base_layer, None, **options)  # an attention's other projection
    return True


def _tuned_attention(attention: nn.MultiheadAttention, name: str, **options: Any) -> ParamWrapper:
    """The joint projection of query, key and value, as one matrix each, and the output projection."""
    if attention.in_proj_weight is None:
        raise TypeError(
            f"`{name}` cannot be tuned as a module, since its query, key and value differ in size. Name "
            "`q_proj_weight`, `k_proj_weight` and `v_proj_weight` in `target_parameters` instead."
        )
    for parameter_name in ("in_proj_weight", "out_proj.weight"):
        _check_holds_its_weight(attention, parameter_name, name)
    projection = ParamWrapper(attention, "in_proj_weight", groups=3, **options)
    return ParamWrapper(projection, "out_proj.weight", **options)


def _layer_kind(target: nn.Module, name: str) -> type[SVDScaleShiftLayer]:
    """The wrapper for a module that is not quantised, or an error that says why it has none."""
    for base_type, kind in LAYER_KINDS.items():
        if isinstance(target, base_type):
            _check_computes_a_product(target, base_type, name)
            return kind
    supported = ", ".join(base_type.__name__ for base_type in [*LAYER_KINDS, nn.MultiheadAttention])
    raise TypeError(f"`{name}` cannot be tuned: it is {type(target).__name__}, and none of {supported}. {REMEDY}")


def _check_computes_a_product(target: nn.Module, base_type: type[nn.Module], name: str) -> None:
    # A subclass with a forward of its own may compute something else than the product that takes its place.
    own_forward = type(target).forward is not base_type.forward  # type: ignore[comparison-overlap]
    if own_forward and cast(Tensor, target.weight).numel() and not computes_the_same(target, base_type):
        raise TypeError(
            f"`{name}` cannot be tuned: {type(target).__name__} has its own forward, unlike {base_type.__name__}, and "
            f"does not compute the same. {REMEDY}"
        )
    if getattr(target, "max_norm", None) is not None:
        raise TypeError(f"`{name}` cannot be tuned: with `max_norm` it changes its weight at every call. {REMEDY}")
    _check_holds_its_weight(target, "weight", name)
    weight = cast(Tensor, target.weight)
    if not weight.is_floating_point():
        raise TypeError(f"`{name}` cannot be tuned: its weight is {weight.dtype}. {REMEDY}")


def _check_holds_its_weight(target: nn.Module, parameter_name: str, name: str) -> None:
    """Refuses weights that a module computes from others: the decomposition would be of a passing value."""
    if is_computed(target, parameter_name):
        raise TypeError(
            f"`{name}` cannot be tuned: its {parameter_name} is computed from other parameters (weight norm, spectral "
            f"norm, a parametrization or pruning). {MAKE_PERMANENT}"
        )


def _keep_readable(target: nn.Module) -> None:
    """Keeps bitsandbytes from packing a 4-bit weight, at the first evaluation on a CPU with AVX512-BF16, into a format
    from which PEFT reads other numbers, silently, and which rounds the blocks' scales to bfloat16."""
    if getattr(getattr(getattr(target, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "it was evaluated on this CPU, for which bitsandbytes has packed and rounded its 4-bit weight. Load the "
            "base model again, and add the adapter before evaluating it."
        )
    if hasattr(target, "support_avx512bf16_for_cpu"):
        cast(Any, target).support_avx512bf16_for_cpu = False
