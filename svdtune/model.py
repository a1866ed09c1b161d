"""Which modules of a model are tuned, and what takes their place."""

from __future__ import annotations

from typing import cast

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from svdtune.config import SVDScaleShiftConfig
from svdtune.layer import LAYER_TYPES, SVDScaleShiftLayer


class SVDScaleShiftModel(BaseTuner):
    """A model whose targeted layers learn a scale and a shift of their singular values.

    Made by ``peft.get_peft_model(model, SVDScaleShiftConfig(...))``; see `SVDScaleShiftConfig` for the choices.

    Example:

        >>> from peft import get_peft_model
        >>> from svdtune import SVDScaleShiftConfig
        >>> model = get_peft_model(model, SVDScaleShiftConfig(target_modules=["q_proj", "v_proj"]))
        >>> model.print_trainable_parameters()
    """

    prefix: str = "svd_scale_shift_"
    tuner_layer_cls = SVDScaleShiftLayer
    target_module_mapping = {
        model_type: list(names) for model_type, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
    }

    def _create_and_replace(  # type: ignore[override]  # PEFT's wrappers of bare parameters are for other methods
        self,
        config: SVDScaleShiftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, SVDScaleShiftLayer):
            target.update_layer(adapter_name, config)
            return
        layer_type = _layer_type(target, parent, current_key)
        try:
            new_module = layer_type(target, adapter_name, config)
        except ValueError as error:
            raise ValueError(f"`{current_key}` cannot be tuned: {error}") from error
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leaves A and B in float32, as they are made, unless the dtype of the base weight is asked for."""
        if not autocast_adapter_dtype:
            for module in self.modules():
                if isinstance(module, SVDScaleShiftLayer):
                    module.cast_adapter(adapter_name, module.weight.dtype)


def _layer_type(target: nn.Module, parent: nn.Module, name: str) -> type[SVDScaleShiftLayer]:
    """The wrapper for a module, or an error that says why it has none."""
    remedy = "Take it out of `target_modules`, or name it in `exclude_modules`."
    # nn.TransformerEncoderLayer does so in eval mode, which would evaluate the base model after training the adapter.
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        owner = type(parent).__name__
        raise TypeError(f"`{name}` cannot be tuned: its {owner} reads the weight without calling the module. {remedy}")
    for base_type, layer_type in LAYER_TYPES.items():
        if isinstance(target, base_type):
            # A subclass with a forward of its own computes something else than the product that takes its place.
            own_forward = type(target).forward is not base_type.forward  # type: ignore[comparison-overlap]
            if own_forward:
                raise TypeError(
                    f"`{name}` cannot be tuned: {type(target).__name__} has its own forward, unlike "
                    f"{base_type.__name__}. {remedy}"
                )
            weight = cast(Tensor, target.weight)
            if not weight.is_floating_point():
                raise TypeError(f"`{name}` cannot be tuned: its weight is {weight.dtype}. {remedy}")
            return layer_type
    supported = ", ".join(f"nn.{base_type.__name__}" for base_type in LAYER_TYPES)
    raise TypeError(f"`{name}` cannot be tuned: it is {type(target).__name__}, and not {supported}. {remedy}")
