"""Models whose weights accelerate keeps on the CPU or a disk until a module is called."""

import accelerate
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from svdtune import SVDScaleShiftConfig

TOKENS = torch.arange(3, 9)[None]


def llama():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.2)).eval()


def tuned(base, train, **choices):
    return train(get_peft_model(base, SVDScaleShiftConfig(target_modules=["q_proj", "down_proj"], **choices))).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("choices", [{}, {"one_sided": True}, {"rank": 3}], ids=str)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_tuned_model_is_offloaded(where, choices, train, relative_error, tmp_path):
    model = tuned(llama(), train, **choices)
    expected = logits(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert relative_error(logits(model), expected) < 1e-5


@pytest.mark.parametrize("choices", [{}, {"one_sided": True}, {"rank": 3}], ids=str)
def test_an_offloaded_model_is_tuned(choices, train, relative_error, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    on_cpu = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    devices = dict.fromkeys(on_cpu, "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map={**devices, "model.layers.1": "disk"}, offload_folder=tmp_path / "offload"
    )
    torch.manual_seed(1)
    model = tuned(offloaded, train, **choices)
    torch.manual_seed(1)
    assert relative_error(logits(model), logits(tuned(base, train, **choices))) < 1e-5
