"""Which of PEFT's tests in the collected files do not run against our method, and why."""

from __future__ import annotations

import inspect
import re

from peft import PeftModelForSeq2SeqLM
from transformers import GenerationMixin

OTHER_METHOD = "makes the config of another method itself"
NO_METHOD = "tests functions of PEFT that no method takes part in"

# Reason, and the tests that it holds for: regular expressions, searched in file::class::test[parameters].
TESTS: dict[str, list[str]] = {
    "tests prompt learning": [
        "test_prompt_tuning",
        "test_training_prompt_learning_tasks",
        "prefix_tuning",
        "test_multitask_prompt",
        "test_prompt_learning",
        "test_model_prompt",
    ],
    "loads an adapter or a model from the hub, past the cache": [
        "test_from_pretrained_cache_dir",
        "TestCheckIsPeftModel",
        "TestLoadAdapterOfflineMode",
        "test_get_peft_model_revision_warning",
        "test_multiple_adapters_(automatic|seq_cls_mixed)_modules_to_save",
        "TestModelAndLayerStatus::test_transformers?_model",
        "test_inject_from_state_dict_(low_cpu_mem_usage|model)_with_weight_conversion",
        "test_prefix_removal_is_undone",
        # Asks the hub for the size of the vocabulary before it was resized.
        r"test_save_pretrained_auto\[peft_config0-True",
    ],
    "asserts a size of the hub's model: 5 layers, or a width of 768": [
        r"test_module_matching_lora$",
        "test_weight_tying_applied_when_model_is_tied",
    ],
    "expects that an embedding of more rows needs other values; ours has as many as features": [
        "test_load_resized_embedding_ignore_mismatched_sizes",
    ],
    "tests DoRA, a variant of LoRA": ["test_gpt2_dora"],
    "needs diffusers and a pipeline from the hub": ["diffusers_pipeline", "stable_diffusion", "_diffusion$"],
    "tests LoRA's ways to initialise its two matrices": [
        "test_initialization.py::TestLoraInitialization",
        "test_initialization.py::Test(Corda|Eva)Initialization",
    ],
    "tests LoRA's rank and alpha: attributes r, lora_alpha, scaling, alpha_pattern": [
        "TestRankAndAlphaPattern",
        "TestScalingAdapters",
        "test_initialization.py::TestScaling",
        "test_rank_pattern_for_moe_target_parameters",
        "TestMultiRankAdapter",
    ],
    "asserts the names of LoRA's classes or parameters, such as lora_A": [
        "TestLayerRepr",
        "TestDynamicDispatch",
        "test_inject_adapter_in_model$",
        "test_get_peft_model_state_dict$",
        "TestLowLevelFunctional::test_modules_to_save",
        "test_inject_from_state_dict_missing_keys_warning",
        "test_base_model_module_named_like_peft_prefix",
        "test_save_pretrained_warns_for_unsharded_state_dict",
        "TestModelAndLayerStatus::test_(model_)?requires_grad_(model_)?irregular",
        "TestModelAndLayerStatus::test_(module_type|adapter_model_type|peft_types)",
        "TestModelAndLayerStatus::test_target_parameters_and_target_modules",
        "TestModelAndLayerStatus::test_model_target_parameters",
        "TestModelAndLayerStatus::test_model_status_with",
        "TestTunerStateDictKeyPrefixes::test_prefixes_(lora|select_correct|model_with_injected|multiple_adapters)",
        "test_targeting_trainable_tokens_raises",
        "TestDisableInputDtypeCasting",
        "TestRequiresGrad::test_requires_grad_(lora|modules_to_save|follows_inference_mode)",
        "test_loading_adapter_preserves_custom_requires_grad",
        "TestLowCpuMemUsage::test_get_peft_model_",
        "test_from_pretrained_missing_keys_warning",
        "test_targeting_module_and_targeting_param_equivalent",
        "test_adding_second_adapter_reuses_param_wrapper",
        "test_mha_gradients_set_correctly",
        "test_target_multiple_parameters_on_same_module",
        "test_target_parameters_forward_under_autocast",
        "test_target_parameters_works_with_existing_parametrization",
        "test_maybe_include_all_linear_does_not_target_classifier_head",
        "test_add_second_adapter_with_all_linear_works",
        "test_get_peft_model_applies_find_target_modules",
        "TestModelAndLayerStatus::test_target_parameters$",
    ],
    "combines LoRA's pairs of matrices: `cat` and `svd` mean nothing for vectors, whose sum is exact": [
        r"test_add_weighted_adapter_with_different_scaling\[(cat|\w*svd)",
        "test_add_weighted_adapter_cat_with_rank_pattern",
    ],
    "hotswap_adapter of PEFT takes LoRA alone; svdtune has its own, and tests of it": ["TestHotSwapping"],
    "counts how often LoRA's parametrization of a parameter is computed": [
        "test_target_parameter_result_caching_works"
    ],
    "converts another method's adapter to LoRA": ["test_lora_conversion.py"],
    "expects that weighted combinations refuse target_parameters, or say so in LoRA's words; ours combine them": [
        "test_target_parameters.py::.*test_weighted_combination_of_adapters",
        "test_target_parameter_on_top_level_module_raises",
    ],
    "asserts LoRA's warning about tied weights": ["TestWeightTying"],
    "asserts how many values LoRA trains in a model": [
        "TestModelAndLayerStatus::test_nb_params",
        "TestModelAndLayerStatus::test_model_with_injected_layers",
    ],
    "expects LoRA's words for what is refused here, too": [
        "test_mixed_adapter_batches_mha_raises",
        r"test_target_parameters.py::.*test_(generate_with_)?mixed_adapter_batches\[",
    ],
    "skips every method: its condition, `!= LoraConfig or != BOFTConfig`, always holds": [
        "test_disable_adapter_with_bias_warns",
    ],
    "PeftMixedModel has a fixed list of methods, to which none from outside PEFT can be added": [
        "mixed_model",
        r"test_add_adapter_rejects_duplicate_name_without_mutation\[True",
    ],
}

# PEFT 0.21.0's model for encoder-decoders asks for a method that later versions of transformers no longer have.
NEEDED_BY_SEQ2SEQ = "_prepare_encoder_decoder_kwargs_for_generation"
if NEEDED_BY_SEQ2SEQ in inspect.getsource(PeftModelForSeq2SeqLM) and not hasattr(GenerationMixin, NEEDED_BY_SEQ2SEQ):
    TESTS["PeftModelForSeq2SeqLM of this PEFT fails with this transformers, whatever the method"] = [
        "test_encoder_decoder_models.py::TestEncoderDecoderModels::",
    ]


def reason(test: str) -> str | None:
    """The reason to leave a test out, by its name below PEFT's folder of tests; None if there is none."""
    return next((reason for reason, tests in TESTS.items() if any(re.search(t, test) for t in tests)), None)
