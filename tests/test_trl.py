"""trl copies the initial adapter by its parameters' names, and trains against the copy."""

import os
import subprocess
import sys
from pathlib import Path

# Apart from the other packages, since transformers would import trl's wherever they are found.
TRAINERS = Path(__file__).parents[1] / ".venv" / "trainers"

SCRIPT = """
import sys
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from svdtune import SVDScaleShiftConfig

torch.manual_seed(0)
words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words))
base = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2))
model = get_peft_model(base, SVDScaleShiftConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))

pairs = {"prompt": ["a b"] * 4, "chosen": [" c d"] * 4, "rejected": [" e f"] * 4}
options = DPOConfig(
    sys.argv[1], per_device_train_batch_size=2, max_steps=3, report_to=[], use_cpu=True, logging_steps=1, bf16=False,
    learning_rate=0.05, lr_scheduler_type="constant", beta=1.0, seed=0,
)
trainer = DPOTrainer(model, args=options, train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer)
reference = {name: parameter.clone() for name, parameter in trainer.model.named_parameters() if ".ref." in name}
assert reference, "trl made no reference"
for name, parameter in reference.items():
    assert torch.equal(parameter, trainer.model.get_parameter(name.replace(".ref.", ".default."))), name
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert abs(losses[0] - 0.6931) < 1e-3 and losses[-1] < losses[0] - 0.01, losses
assert all(torch.equal(parameter, trainer.model.get_parameter(name)) for name, parameter in reference.items())
"""


def test_dpo_starts_at_its_reference_and_leaves_it_alone(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(TRAINERS),
        "HF_DATASETS_CACHE": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "output")]
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
