"""Several threads that compute with one model, and memory after loading, swapping and merging many times."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
import threading
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from soak.outcome import Outcome, until
from svdtune import SVDScaleShiftConfig, hotswap_adapter

THREADS = 4
# Rounds before memory is measured, in which caches fill.
WARM_UP = 30
LEAK_BYTES = 8 * 2**20


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.embed = nn.Conv2d(3, 8, 3), nn.Linear(8, 24), nn.Embedding(10, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(images).mean((2, 3)) + self.embed.weight.sum(0))


def run(seconds: float, seed: int) -> list[Outcome]:
    return [_of_threads(seconds / 2, seed), _of_memory(seconds / 2)]


def _tuned(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(_Net(), SVDScaleShiftConfig(target_modules=["conv", "fc"], init_weights=False)).eval()


def _of_threads(seconds: float, seed: int) -> Outcome:
    """Forward passes of several threads at once, also as mixed batches, against the same passes alone."""
    outcome, model, lock = Outcome("answers of four threads"), _tuned(seed), threading.Lock()
    model.add_adapter("second", SVDScaleShiftConfig(target_modules=["conv", "fc"], init_weights=False))
    images = torch.randn(16, 2, 3, 8, 8)
    names = [None, ["default", "second"], ["second", "__base__"], ["__base__", "default"]]
    with torch.no_grad():
        alone = [[_answer(model, batch, chosen) for chosen in names] for batch in images]

    def work(number: int) -> None:
        for round_number in until(seconds):
            index, chosen = (round_number + number) % len(images), (round_number * 7 + number) % len(names)
            with torch.no_grad():
                right = torch.allclose(_answer(model, images[index], names[chosen]), alone[index][chosen], atol=1e-6)
            with lock:
                outcome.add("right") if right else outcome.fail(f"batch {index}, adapters {names[chosen]}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    outcome.failures = outcome.failures[:5]
    return outcome


def _answer(model: nn.Module, images: torch.Tensor, names: list[str] | None) -> torch.Tensor:
    return model(images) if names is None else model(images, adapter_names=names)


def _of_memory(seconds: float) -> Outcome:
    outcome, base = Outcome("loads, swaps, merges and deletions"), _Net()
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(
            copy.deepcopy(base), SVDScaleShiftConfig(target_modules=["conv", "fc"], init_weights=False)
        ).save_pretrained(folder)
        model = PeftModel.from_pretrained(base, folder)
        before = (0, 0)
        for number in until(seconds):
            model.load_adapter(folder, "other")
            hotswap_adapter(model, folder, adapter_name="other")
            model.merge_adapter()
            model.unmerge_adapter()
            model.delete_adapter("other")
            if number == WARM_UP:
                before = _memory()
            outcome.add("done")
        after = _memory()
    grown = (after[0] - before[0], after[1] - before[1]) if before[0] else (0, 0)
    outcome.remark = f"{grown[0] / 2**20:+.1f} MiB, {grown[1]:+d} tensors since round {WARM_UP}"
    if grown[0] > LEAK_BYTES or grown[1] > 0:
        outcome.fail("memory grows")
    return outcome


def _memory() -> tuple[int, int]:
    """Resident bytes of this process (0 where /proc is missing), and how many tensors it has."""
    gc.collect()
    pages = Path("/proc/self/statm")
    resident = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.is_file() else 0
    return resident, sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
