"""A method put to work on a model: what learns, what decays, and what of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import svdtune
from sam_medical.common.errors import UserError
from sam_medical.common.expressions import matches_any
from sam_medical.methods.method import POSITION_TYPES, Method, names_in
from sam_medical.models.prompted_sam import PromptedSam
from svdtune.learned import LearnedVector


def tune(model: nn.Module, method: Method, labels: int, target_modules: str) -> nn.Module:
    """The model as the method trains it; everything else stays frozen.

    Args:
        model: A `PromptedSam`, or a network, which is trained as it is.
        method: What to do.
        labels: How many there are.
        target_modules: Regular expression of the encoder's layers to tune, for methods that have an adapter.

    Returns:
        A `PeftModel` if the method is one of PEFT's, otherwise the model.

    Raises:
        UserError: if the expression is none, or matches no layer that can be tuned.
    """
    if not isinstance(model, PromptedSam):
        return model
    if method.takes_target_modules:
        check_target_modules(model, target_modules)
    try:
        if method.insert:
            method.insert(model, labels, target_modules)
        if method.adapter:
            return get_peft_model(model, expected_config(model, method, target_modules))
    except (ValueError, TypeError) as error:
        raise UserError(f"target_modules {target_modules!r}: {error}") from error
    for name in names_in(model, method.trained):
        model.get_submodule(name).requires_grad_(True)
    if method.biases:
        for name, parameter in model.image_encoder.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)
    return model


def expected_config(model: PromptedSam, method: Method, target_modules: str) -> PeftConfig:
    """PEFT's configuration of a method on a model."""
    assert method.adapter is not None
    config = method.adapter(model, target_modules)
    cast(Any, config).modules_to_save = names_in(model, method.trained)
    return config


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate: float, value_rate: float
) -> list[dict[str, Any]]:
    """The trainable parameters for an optimizer, see `svdtune.parameter_groups`.

    Only matrices decay, as in all published results: positions mean something where they are.
    """
    undecayed = [
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, (*POSITION_TYPES, LearnedVector)) or name.startswith(("rel_pos", "position_embeddings"))
    ]
    return svdtune.parameter_groups(model, learning_rate, weight_decay, value_rate, undecayed)


def count_trainable(model: nn.Module) -> int:
    """How many values learn; of a parameter that is held at zero in places, those that can move."""
    return sum(
        getattr(parameter, "values_that_learn", parameter.numel())
        for parameter in model.parameters()
        if parameter.requires_grad
    )


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All of a tuned model that is not the pretrained one's."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model)
    names = _kept_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def load_kept_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, dict(tensors))
    else:
        model.load_state_dict(tensors, strict=False)


def _kept_names(model: nn.Module) -> set[str]:
    """What learns, the statistics of norms that learn, and prompts, which are random if they do not learn."""
    names = set()
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        learns = any(parameter.requires_grad for parameter in own.values())
        is_prompt = isinstance(model, PromptedSam) and module_name.startswith("prompts.")
        for name in [*own, *dict(module.named_buffers(recurse=False))]:
            if is_prompt or (own[name].requires_grad if name in own else learns):
                names.add(f"{module_name}.{name}".removeprefix("."))
    return names


def check_target_modules(model: PromptedSam, target_modules: str) -> None:
    """Raises a `UserError` if an expression is none, matches no layer, or takes too long to."""
    names = [name for name, _ in model.named_modules()]
    if not matches_any(target_modules, names):
        example = next(name for name in names if name.endswith("qkv"))
        raise UserError(f"target_modules {target_modules!r}: matches no layer; their names are like {example}")
