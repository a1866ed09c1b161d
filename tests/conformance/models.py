"""Small random models under the names that PEFT's tests ask the hub for, in a cache folder as the hub client keeps it.

They have the architectures of the hub's models, a few thousand weights each, and fixed seeds.
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

import torch
import transformers as t
from peft import LoraConfig
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

REVISION = "0" * 40
# An adapter that tests of configs load, from a branch called "test". What it holds makes no difference to them.
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"

# Token 0 pads, as no test uses it as a word: padding is a row of zeros, and a layer that norms a row of zeros
# turns rounding errors into differences. Narrow models need larger weights than the default's 0.02 to say anything.
TOKENS = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
ENCODER = {**SMALL, "vocab_size": 1000, "intermediate_size": 32, "max_position_embeddings": 64}
DECODER = {**TOKENS, **SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}
SHORT = {"initializer_range": 0.1, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}
BART = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in SIDE.items()}
T5 = {"vocab_size": 1000, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}


def opt(layers: int = 2) -> t.PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = t.OPTConfig(
        **TOKENS, **sizes, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=128, init_std=0.1
    )
    return t.OPTForCausalLM(config)


def llama() -> t.PreTrainedModel:
    return t.LlamaForCausalLM(t.LlamaConfig(**DECODER))


def gpt2() -> t.PreTrainedModel:
    return t.GPT2LMHeadModel(t.GPT2Config(**TOKENS, **SHORT))


def bart() -> t.PreTrainedModel:
    config = t.BartConfig(
        vocab_size=1000, d_model=16, max_position_embeddings=64, init_std=0.5, decoder_start_token_id=2, **BART
    )
    return t.BartForConditionalGeneration(config)


def t5() -> t.PreTrainedModel:
    return t.T5ForConditionalGeneration(t.T5Config(**T5, decoder_start_token_id=0))


def llama4() -> t.PreTrainedModel:
    config = t.Llama4TextConfig(
        **DECODER, intermediate_size_mlp=32, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    return t.Llama4ForCausalLM(config)


def gpt_oss() -> t.PreTrainedModel:
    config = t.GptOssConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2)
    return t.GptOssForCausalLM(config)


MODELS = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**DECODER)),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": llama,
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER)),
    "hf-internal-testing/tiny-random-gpt2": gpt2,
    "peft-internal-testing/opt-125m": lambda: opt(layers=12),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": bart,
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: t.BertForSequenceClassification(
        t.BertConfig(**ENCODER)
    ),
    "peft-internal-testing/tiny-random-BertModel": lambda: t.BertModel(t.BertConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-BloomForCausalLM": lambda: t.BloomForCausalLM(
        t.BloomConfig(**TOKENS, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.1)
    ),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: t.DebertaModel(
        t.DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: t.DebertaV2Model(t.DebertaV2Config(**ENCODER)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": gpt2,
    "peft-internal-testing/tiny-random-gpt2": gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: t.GPTJForCausalLM(
        t.GPTJConfig(**TOKENS, **SHORT, rotary_dim=4)
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(**TOKENS, **SMALL, intermediate_size=32)
    ),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": llama,
    "peft-internal-testing/tiny-random-OPTForCausalLM": opt,
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: t.RobertaForSequenceClassification(
        t.RobertaConfig(**ENCODER)
    ),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: t.RobertaModel(t.RobertaConfig(**ENCODER)),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": t5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t5,
    "peft-internal-testing/tiny-random-t5": t5,
    "google/flan-t5-small": t5,
    "trl-internal-testing/tiny-GptOssForCausalLM": gpt_oss,
    "trl-internal-testing/tiny-Llama4ForCausalLM": llama4,
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: t.LlamaForSequenceClassification(
        t.LlamaConfig(**DECODER)
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": llama,
}


def build(hub_cache: Path) -> None:
    """Writes all models, as if they had been downloaded."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().eval().save_pretrained(_snapshot(hub_cache, name, "main"))
        words().save_pretrained(_snapshot(hub_cache, name, "main"))
    LoraConfig(target_modules=["q_proj", "v_proj"]).save_pretrained(_snapshot(hub_cache, ADAPTER, "test"))


def words() -> t.PreTrainedTokenizerFast:
    """A tokenizer that knows no word but its special tokens and single letters."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *string.ascii_letters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = Split(Regex("[a-z]"), "isolated")
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def _snapshot(hub_cache: Path, name: str, branch: str) -> Path:
    """Where the hub's client looks for the files of a branch."""
    folder = hub_cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / branch).write_text(REVISION)
    return folder / "snapshots" / REVISION


if __name__ == "__main__":
    build(Path(sys.argv[1]))
