"""How do PEFT's methods compare in time, memory and number of trained values?

    python benchmarks/peers.py [--quick] [--device cuda --dtype bfloat16]

The script measures a training step of SAM's encoders and of blocks of other transformers. Each method has its authors'
defaults. Full fine-tuning and the published way of tuning singular values are included.
"""

from __future__ import annotations

import gc
import time
import warnings
from functools import partial
from typing import Any

import matplotlib

from harness import Options, Result, bytes_kept, results_folder, run, time_interleaved
from subjects import (
    FULL,
    LLAMA_ALL,
    METHODS,
    PUBLISHED,
    Subject,
    bert_block,
    held_tensors,
    llama_block,
    sam_encoder,
    trained_values,
    training_step,
    tuned,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REFERENCE = "LoRA r=8"
SUBJECTS = {
    "ViT-B 256": partial(sam_encoder, blocks=3),
    "BERT": bert_block,
    "Llama q, v": partial(llama_block, targets=["q_proj", "v_proj"]),
    "Llama all": partial(llama_block, targets=LLAMA_ALL),
    "ViT-B 1024": partial(sam_encoder, pixels=1024, batch=1, blocks=3),
    "ViT-H 256": partial(sam_encoder, batch=2, blocks=1, size="H"),
}
QUICK = ["Llama all"]
# Fifteen models and the memory of their steps need more than 24 GB.
ONLY_ON_GPU = ["ViT-B 1024"]


def compared(subject: Subject, options: Options) -> dict[str, dict[str, Any]]:
    """The costs of each method on the subject, by method, or the reason why a method cannot tune it."""
    found: dict[str, dict[str, Any]] = {}
    steps = {}
    for method in [*METHODS, PUBLISHED, FULL]:
        try:
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = tuned(subject, method)
            wrapping = time.perf_counter() - start
            step = training_step(model, subject.x)
            step()
            kept = bytes_kept(partial(model, subject.x), held_tensors(model))
        except Exception as error:
            found[method] = {"error": f"{type(error).__name__}: {error}"}
            continue
        steps[method] = step
        found[method] = {"trained": trained_values(model), "kept": kept, "wrapping": wrapping}
    timings = time_interleaved(steps, options.rounds_or(full=5, quick=3), warm_up=0)
    for row in timings.rows(REFERENCE):
        found[row[0]] |= {"seconds": timings.median(row[0]), "ratio": float(row[2]), "spread": row[3]}
    return found


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for method, costs in found.items():
        if "error" in costs:
            rows.append([method, costs["error"][:60], "", "", "", ""])
            continue
        kept = costs["kept"] / found[REFERENCE]["kept"]
        time_and_memory = [f"{costs['ratio']:.2f}", costs["spread"], f"{kept:.2f}"]
        rows.append([method, f"{costs['trained']:,}", *time_and_memory, f"{costs['wrapping']:.1f}"])
    return rows


def plot(result: Result, options: Options) -> None:
    """Plots time and kept memory of each method on the first subject, relative to LoRA."""
    found = next(iter(result.data.values()))
    methods = [method for method, costs in found.items() if "error" not in costs]
    methods.sort(key=lambda method: found[method]["ratio"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, title, values in zip(
        axes,
        ["time of a training step", "memory kept for backward"],
        [
            [found[method]["ratio"] for method in methods],
            [found[method]["kept"] / found[REFERENCE]["kept"] for method in methods],
        ],
        strict=True,
    ):
        colors = ["#c44e52" if method.startswith("svdtune") else "#8c9bb5" for method in methods]
        bars = axis.barh(methods, values, color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="times LoRA r=8", title=title, xlim=(0, 1.15 * max(values)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(results_folder(options) / "peers.png", dpi=120)
    plt.close(figure)


def measure(options: Options) -> Result:
    result = Result("peers")
    for name, make in SUBJECTS.items():
        if (options.quick and name not in QUICK) or (options.device == "cpu" and name in ONLY_ON_GPU):
            continue
        subject = make(options)
        found = compared(subject, options)
        columns = ["", "trained values", "step, times LoRA r=8", "least - most", "kept", "wrapping, s"]
        result.add_table(subject.name, columns, table(found))
        result.data[name] = found
        result.save(options)  # saves after each subject, because a run takes an hour
        gc.collect()
    plot(result, options)
    return result


if __name__ == "__main__":
    run(measure)
