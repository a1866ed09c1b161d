"""Small models and data that stand for a reader's own in the Python blocks of the pages; see `test_docs`."""

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    SamConfig,
    SamModel,
    SamVisionConfig,
)

from svdtune import SVDScaleShiftConfig

VOCABULARY = 50

__all__ = [
    "PeftModel",
    "SVDScaleShiftConfig",
    "get_peft_model",
    "save_adapters",
    "save_sam_adapter",
    "save_tiny_bert",
    "tiny_llama",
    "tiny_llama_classifier",
    "tokens",
    "torch",
    "toy_dataset",
]


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(_llama_config())


def tiny_llama_classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(_llama_config())


def _llama_config():
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        num_labels=3,
    )


def save_tiny_bert(folder):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def tokens(samples):
    return torch.randint(1, VOCABULARY, (samples, 8))


def toy_dataset(size=8):
    return [{"input_ids": tokens(1)[0], "labels": torch.tensor(index % 3)} for index in range(size)]


def save_adapters(base, *folders, **choices):
    """Saves an adapter with values of its own in each folder, and leaves the base as it was."""
    for folder in folders:
        model = get_peft_model(base, SVDScaleShiftConfig(init_weights=False, **choices))
        model.save_pretrained(folder)
        model.unload()


def save_sam_adapter(folder):
    vision = SamVisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        output_channels=16,
        mlp_dim=48,
        window_size=2,
        global_attn_indexes=[1],
    )
    model = get_peft_model(SamModel(SamConfig(vision_config=vision.to_dict())), SVDScaleShiftConfig())
    model.save_pretrained(folder)
