"""Is a batch with 64 different adapters slower than a batch with a single adapter?

    python benchmarks/mixed_batch.py [--quick] [--device cuda --dtype bfloat16]

The model is a BERT-like encoder (6 layers of width 384, as in MiniLM) with all linear layers tuned. The batch has 64
samples of 32 tokens. Only the forward pass runs. PEFT's LoRA with r=8 on the same layers runs in the same rounds.
"""

from __future__ import annotations

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from harness import Options, Result, run, time_interleaved
from subjects import lora, ours

TARGETS = ["query", "key", "value", "dense"]
SAMPLES, TOKENS, WORDS = 64, 32, 1000
NAMES = [f"adapter{index}" for index in range(SAMPLES)]


def model_with_adapters(config: PeftConfig) -> PeftModel:
    """An encoder with one adapter per sample, with trained (random) values."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = get_peft_model(BertModel(BertConfig(vocab_size=WORDS, **sizes)), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model.eval()


def measure(options: Options) -> Result:
    result = Result("mixed_batch")
    tokens = torch.randint(0, WORDS, (SAMPLES, TOKENS), device=options.device)
    methods = {"svdtune": ours(init_weights=False), "LoRA r=8": lora(8, init_lora_weights=False)}
    for method, config in methods.items():
        model = options.to_device(model_with_adapters(config(TARGETS)))
        alone, mixed = f"{method}, one adapter", f"{method}, {SAMPLES} adapters"
        calls = {alone: lambda: model(tokens), mixed: lambda: model(tokens, adapter_names=NAMES)}  # noqa: B023
        with torch.inference_mode():
            timings = time_interleaved(calls, options.rounds_or(full=11, quick=7), warm_up=2)
        result.add_table(
            f"{SAMPLES} samples of {TOKENS} tokens", ["", "seconds", "times one", "least - most"], timings.rows(alone)
        )
        result.data[method] = timings.seconds
        if method == "svdtune":
            result.claims.append(timings.claim(f"{SAMPLES} adapters in a batch of {SAMPLES}", mixed, alone, 1.2))
    return result


if __name__ == "__main__":
    run(measure)
