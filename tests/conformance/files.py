"""Which files of PEFT's tests are collected, and why the others are not."""

from __future__ import annotations

FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_helpers.py",
    "test_initialization.py",
    "test_lora_conversion.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_other.py",
    "test_seq_classifier.py",
    "test_target_parameters.py",
    "test_token_classification_qa.py",
    "test_trainable_tokens.py",
    "test_tuners_utils.py",
)

OTHER_FILES: dict[str, list[str]] = {
    "tests one other method, or one use of it": [
        *("test_adamss_asa.py", "test_adaption_prompt.py", "test_arrow.py", "test_bdlora.py", "test_boft.py"),
        *("test_cartridge.py", "test_cpt.py", "test_deft.py", "test_frod.py", "test_lora_ga.py"),
        *("test_lora_intruders.py", "test_lora_megatron.py", "test_lora_variants.py", "test_lorafa.py"),
        *("test_loraplus.py", "test_multitask_prompt_tuning.py", "test_osf.py", "test_poly.py", "test_pvera.py"),
        *("test_randlora.py", "test_riemannian_lora.py", "test_shadow.py", "test_shira.py", "test_supertuning.py"),
        *("test_unilora.py", "test_vblora.py", "test_velora.py", "test_vera.py", "test_xlora.py"),
    ],
    "PeftMixedModel has a fixed list of methods, to which none from outside PEFT can be added": ["test_mixed.py"],
    "tests functions of PEFT that no method takes part in": ["test_bufferdict.py", "test_incremental_pca.py"],
    "loads trained LoRA adapters from the hub": ["test_auto.py", "test_hub_features.py", "test_integrations.py"],
    "needs a picture and its preprocessing from the hub": ["test_vision_models.py"],
    "needs diffusers and a pipeline from the hub": ["test_stablediffusion.py"],
    "needs a text data set from the hub; run by PEFT on demand only": ["test_torch_compile.py"],
    "needs a GPU, or quantised models from the hub": [
        *("test_common_gpu.py", "test_gpu_examples.py", "test_gptqmodel.py", "test_quantization.py"),
    ],
}
