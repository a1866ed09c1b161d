"""The models of the benchmarks, each with an input, and PEFT's methods, each with a config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, LlamaConfig, SamVisionConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.sam.modeling_sam import SamVisionModel

from harness import Options
from published import with_rebuilt_layers
from svdtune import SVDScaleShiftConfig
from svdtune.layer import SVDScaleShiftLayer

SAM_TARGETS = ["qkv", "proj", "lin1", "lin2"]
SAM_WIDTH = {"B": 768, "H": 1280}
QUICK_BLOCKS = 3


class Output(nn.Module):
    """Wraps a model so that it takes one input and returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(inputs_embeds=x) if isinstance(self.model, LlamaModel) else self.model(x)
        output = getattr(output, "last_hidden_state", output)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Subject:
    """A model to tune: its name, its target layers and an input."""

    name: str
    model: nn.Module
    targets: list[str]
    x: Tensor


def sam_encoder(options: Options, pixels: int = 256, batch: int = 8, blocks: int = 12, size: str = "B") -> Subject:
    """SAM's image encoder with random weights; targets are all linear layers. Every third block attends globally."""
    width = SAM_WIDTH[size]
    config = SamVisionConfig(
        hidden_size=width,
        mlp_dim=4 * width,
        num_attention_heads=width // (64 if size == "B" else 80),
        num_hidden_layers=blocks,
        image_size=pixels,
        global_attn_indexes=list(range(2, blocks, 3)) if size == "B" else [0],
    )
    name = f"SAM ViT-{size} encoder, {blocks} block{'s' * (blocks > 1)}, {pixels} px, batch {batch}"
    model = Output(SamVisionModel(config))
    return Subject(
        name, options.to_device(model), SAM_TARGETS, options.to_device(torch.randn(batch, 3, pixels, pixels))
    )


def bert_block(options: Options, batch: int = 8, tokens: int = 128) -> Subject:
    """A block of BERT's base size; targets are all linear layers."""
    model = Output(BertLayer(BertConfig(attn_implementation="sdpa")))
    x = options.to_device(torch.randn(batch, tokens, 768))
    return Subject(
        f"BERT-like block, batch {batch} of {tokens}", options.to_device(model), ["query", "key", "value", "dense"], x
    )


def llama_block(options: Options, targets: list[str], batch: int = 2, tokens: int = 256) -> Subject:
    """A block with Llama's proportions, grouped queries and a gated MLP."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_hidden_layers=1,
        vocab_size=32,
    )
    x = options.to_device(torch.randn(batch, tokens, 1024))
    name = f"Llama-like block, {'q and v' if len(targets) == 2 else 'all linear'}, batch {batch} of {tokens}"
    return Subject(name, options.to_device(Output(LlamaModel(config))), targets, x)


LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Config = Callable[[list[str]], PeftConfig]


def lora(rank: int, **choices: Any) -> Config:
    return lambda targets: LoraConfig(r=rank, target_modules=targets, **choices)


def ours(**choices: Any) -> Config:
    return lambda targets: SVDScaleShiftConfig(target_modules=targets, **choices)


# Each method has its defaults, except for required settings. Ranks are those of the authors.
METHODS: dict[str, Config] = {
    "svdtune": ours(),
    "svdtune, rank=64": ours(rank=64),
    "svdtune, one-sided": ours(one_sided=True),
    "LoRA r=8": lora(8),
    "LoRA r=16": lora(16),
    "LoRA r=64": lora(64),
    "DoRA r=8": lora(8, use_dora=True),
    "IA3": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    "OFT": lambda targets: peft.OFTConfig(target_modules=targets, oft_block_size=32),
    "OSF": lambda targets: peft.OSFConfig(target_modules=targets),
    "PSOFT": lambda targets: peft.PsoftConfig(target_modules=targets, r=32),
    "VeRA": lambda targets: peft.VeraConfig(target_modules=targets, r=256),
    "MiSS": lambda targets: peft.MissConfig(target_modules=targets, r=64),
}
PUBLISHED, FULL, FROZEN = "the published way", "full fine-tuning", "frozen"


def tuned(subject: Subject, method: str) -> nn.Module:
    """A copy of the subject's model, tuned by the method, in training mode."""
    model = copy.deepcopy(subject.model)
    if method == FULL:
        return model.requires_grad_(True)
    if method == FROZEN:
        return model.requires_grad_(False)
    if method == PUBLISHED:
        return with_rebuilt_layers(model, subject.targets)
    # Other methods get values in the model's dtype. In float32, PEFT's default, they would cast every x and keep the
    # copy. Our values are vectors, and stay in float32.
    autocast = method.startswith("svdtune")
    return get_peft_model(model, METHODS[method](subject.targets), autocast_adapter_dtype=autocast).train()


def trained_values(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def held_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors that a model always holds: parameters, buffers, and our singular vectors and values."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in tuned_layers(model):
        spectrum = layer.spectrum
        tensors += [*spectrum.held_vectors, spectrum.singular_values, spectrum.reciprocals]
    return tensors


def tuned_layers(model: nn.Module) -> list[SVDScaleShiftLayer]:
    return [module for module in model.modules() if isinstance(module, SVDScaleShiftLayer)]


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and a backward pass that discards gradients.

    It excludes the optimizer, whose time depends on the number of trained values.
    """
    if not trained_values(model):
        x = x.detach().requires_grad_()

    def step() -> None:
        model(x).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step
