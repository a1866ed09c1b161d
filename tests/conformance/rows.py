"""What stands in PEFT's tests in place of their own parameters: our config class, and choices for it."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.utils import PeftType

from svdtune import SVDScaleShiftConfig

OURS = SVDScaleShiftConfig

# Every kind of layer, on the small models of test_custom_models.py: (name of the case, model, choices).
LAYERS: list[tuple[str, str, dict[str, Any]]] = [
    ("Linear, by regular expression", "MLP", {"target_modules": "lin0"}),
    ("Linear, first", "MLP", {"target_modules": ["lin0"]}),
    ("Linear, second", "MLP", {"target_modules": ["lin1"]}),
    ("Linear, both", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Linear, other one saved whole", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (
        "Linear, with an excluded one",
        "MLP",
        {"target_modules": "lin.*", "exclude_modules": ["lin0"], "modules_to_save": ["lin0"]},
    ),
    ("Linear, larger", "MLP2", {"target_modules": ["lin0", "lin1"]}),
    ("Linear, beside LayerNorm", "MLP_LayerNorm", {"target_modules": ["lin0"], "modules_to_save": ["layernorm0"]}),
    ("Linear, half of the rank", "MLP", {"target_modules": ["lin0", "lin1"], "rank": 0.5}),
    ("Linear, rank pattern", "MLP", {"target_modules": ["lin0", "lin1"], "rank": 1, "rank_pattern": {"lin0": 7}}),
    ("Linear, SVF", "MLP", {"target_modules": ["lin0", "lin1"], "shift": False, "nonlinearity": "none"}),
    ("Linear, SVDiff", "MLP", {"target_modules": ["lin0", "lin1"], "scale": False}),
    ("Embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Embedding, half of the rank", "EmbConv1D", {"target_modules": ["emb"], "rank": 0.5}),
    ("Conv1D of transformers", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D of transformers and Embedding", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    (
        "Conv1D of transformers, trained tokens",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv1d, larger", "Conv1dBigger", {"target_modules": ["conv1d"]}),
    ("Conv1d, groups", "Conv1dGroups", {"target_modules": ["conv1d"]}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d and Linear", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d, rank of three", "Conv2d", {"target_modules": ["conv2d"], "rank": 3}),
    ("Conv2d, two of them", "Conv2d2", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d, kernel of one", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d, groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv2d, more groups", "Conv2dGroups2", {"target_modules": ["conv2d"]}),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("Conv3d and Linear", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    ("MultiheadAttention", "MHA", {"target_modules": ["mha"]}),
    ("MultiheadAttention and Linear", "MHA", {"target_modules": ["mha", "lin0"]}),
    ("parameters", "MlpUsingParameters", {"target_parameters": ["lin0.weight"]}),
    ("parameters, two", "MlpUsingParameters", {"target_parameters": ["lin0.weight", "lin1.weight"]}),
    ("parameter beside a module", "MLP", {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
]

# Two adapters in one model. The second column makes PEFT's test choose its model: with an embedding, or its MLP.
PAIRS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("same", "ours", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("different", "ours", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("ranks", "ours", {"target_modules": ["lin0"], "rank": 2}, {"target_modules": ["lin0"], "rank": 5}),
    (
        "kin",
        "ours",
        {"target_modules": ["lin0"], "scale": False},
        {"target_modules": ["lin0"], "shift": False, "nonlinearity": "none"},
    ),
    (
        "trained tokens, same",
        "lora+trainable_tokens",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
    (
        "trained tokens, different",
        "lora+trainable_tokens",
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
    ),
    ("parameters, same", "ours", {"target_parameters": ["lin0.weight"]}, {"target_parameters": ["lin0.weight"]}),
    ("parameters, different", "ours", {"target_parameters": ["lin0.weight"]}, {"target_parameters": ["lin1.weight"]}),
]

# Choices for transformers' models, which have defaults for the modules.
DEFAULTS: dict[str, Any] = {"target_modules": None}
TASKS: dict[str, list[dict[str, Any]]] = {
    "test_decoder_models": [
        {"task_type": "CAUSAL_LM", **DEFAULTS},
        {"task_type": "CAUSAL_LM", **DEFAULTS, "trainable_token_indices": [0, 1, 3]},
    ],
    "test_encoder_decoder_models": [{"task_type": "SEQ_2_SEQ_LM", **DEFAULTS}],
    "test_feature_extraction_models": [{"task_type": "FEATURE_EXTRACTION", **DEFAULTS}],
    "test_seq_classifier": [{"task_type": "SEQ_CLS", **DEFAULTS}],
    "TestTokenClassificationModels": [{"task_type": "TOKEN_CLS", **DEFAULTS}],
    "TestQuestionAnsweringModels": [{"task_type": "QUESTION_ANS", **DEFAULTS}],
}

# What only LoRA knows among a LoraConfig's choices. A row that sets one of the first kind is the same test without
# it; one of the second kind makes it a test of something else.
ONLY_LORAS_SIZE = {
    *("r", "lora_alpha", "lora_dropout", "init_lora_weights", "peft_type", "rank_pattern", "alpha_pattern"),
}
SHARED = (
    *("base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("trainable_token_indices", "target_parameters", "bias"),
)


def like(config: Any) -> Any:
    """Our config with the choices of a LoraConfig, or None if it has a choice that is LoRA's own."""
    if type(config) is not LoraConfig or only_loras(config):
        return None
    choices = {name: getattr(config, name) for name in SHARED if name in _changed(config)}
    choices = {name: sorted(value) if isinstance(value, set) else value for name, value in choices.items()}
    if choices.get("bias") == "lora_only":
        choices["bias"] = "svd_scale_shift_only"
    return OURS(**choices, init_weights=config.init_lora_weights is not False)


def only_loras(config: LoraConfig) -> list[str]:
    """The choices made in a LoraConfig that make it a test of LoRA."""
    names = _changed(config) - set(SHARED) - ONLY_LORAS_SIZE
    return sorted([*names, *(["init_lora_weights"] if isinstance(config.init_lora_weights, str) else [])])


def _changed(config: LoraConfig) -> set[str]:
    plain = LoraConfig()
    return {name for name, value in vars(config).items() if value != getattr(plain, name, value)}


class InPlaceOfLora(OURS):
    """Our config, from the arguments of a LoraConfig; for tests that make one themselves."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        config = LoraConfig(*args, **kwargs)
        if only_loras(config):
            pytest.skip(f"about a choice that is LoRA's own: {', '.join(only_loras(config))}")
        return like(config)


def rows(names: list[str], values: list[Any], places: list[str]) -> list[Any] | None:
    """The rows to take in place of PEFT's, or None to leave them.

    Args:
        names: The arguments' names.
        values: PEFT's rows.
        places: The test's module, class and function.
    """
    if names == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        return [(name, model, OURS, choices) for name, model, choices in LAYERS]
    if names == ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
        random = {"init_weights": False}
        return [(name, method, OURS, {**one, **random}, {**other, **random}) for name, method, one, other in PAIRS]
    if names == ["config_cls", "config_kwargs"]:
        return next(([(OURS, choices) for choices in TASKS[place]] for place in places if place in TASKS), None)
    if names == ["model_id", "config_cls", "config_kwargs"]:
        configs = [(model, cls, like(cls(**choices)), choices) for model, cls, choices in values if cls is LoraConfig]
        return [
            (model, OURS, {name: choices[name] for name in SHARED if name in choices})
            for model, _, config, choices in configs
            if config is not None
        ]
    if names == ["config_class", "mandatory_kwargs"]:
        return [(OURS, {})]
    if names in (["config_cls"], ["config_class"]):
        return [OURS]
    return _like_each(values)


def _like_each(values: list[Any]) -> list[Any] | None:
    """Each row with our config where it has a LoraConfig; None if none has."""
    found = []
    for value in values:
        row = value if isinstance(value, tuple) else (value,)
        replaced = [like(entry) if isinstance(getattr(entry, "peft_type", None), PeftType) else entry for entry in row]
        if any(isinstance(entry, OURS) for entry in replaced) and not any(entry is None for entry in replaced):
            found.append(tuple(replaced) if isinstance(value, tuple) else replaced[0])
    return found or None


def is_ours(value: Any) -> bool:
    return value is OURS or isinstance(value, OURS)
