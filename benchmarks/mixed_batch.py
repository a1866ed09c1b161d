"""Does a batch whose samples have 64 different adapters cost more than one with a single adapter?

    python benchmarks/mixed_batch.py

A BERT-like encoder (6 layers of width 384, as MiniLM), all its linear layers tuned, a batch of 64 samples, forward
only. PEFT's LoRA, r=8 on the same layers, runs beside in the same rounds.
"""

from __future__ import annotations

import argparse

import torch
from harness import machine, time_interleaved
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from svdtune import SVDScaleShiftConfig

TARGETS = ["query", "key", "value", "dense"]
SAMPLES = 64


def model_with_adapters(config: PeftConfig) -> PeftModel:
    """An encoder with one adapter a sample, of trained (random) values."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = get_peft_model(BertModel(BertConfig(vocab_size=1000, **sizes)), config, adapter_name="adapter0")
    for index in range(1, SAMPLES):
        model.add_adapter(f"adapter{index}", config)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="tokens a sample")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    models = {
        "svdtune": model_with_adapters(SVDScaleShiftConfig(target_modules=TARGETS, init_weights=False)),
        "LoRA r=8": model_with_adapters(LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)),
    }
    tokens = torch.randint(0, 1000, (SAMPLES, arguments.tokens))
    names = [f"adapter{index}" for index in range(SAMPLES)]
    print(f"{machine()}; {SAMPLES} samples of {arguments.tokens} tokens; {arguments.rounds} rounds\n")
    print("| | seconds | times one adapter | spread |\n|---|---|---|---|")
    for method, model in models.items():
        contenders = {
            f"{method}, one adapter": lambda model=model: model(tokens),
            f"{method}, 64 adapters": lambda model=model: model(tokens, adapter_names=names),
        }
        with torch.inference_mode():
            timings = time_interleaved(contenders, f"{method}, one adapter", arguments.rounds)
        for name, timing in timings.items():
            print(timing.row(name))


if __name__ == "__main__":
    main()
