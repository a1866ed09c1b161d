"""How does the time of a training step grow with rows and width, compared with LoRA?

    python benchmarks/growth.py [--quick] [--device cuda --dtype bfloat16]

The model is a block of SAM's encoder (attention over 256 tokens, an MLP of four times the width). All its linear
layers are tuned. Widths range from 256 to 4,096, and rows from 256 to 65,536: as many as the device can run in some
minutes.
"""

from __future__ import annotations

import statistics

import matplotlib
import torch
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionLayer

from harness import Options, Result, Timings, results_folder, run, time_interleaved
from subjects import SAM_TARGETS, Output, Subject, training_step, tuned

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTHS, ROWS, SIDE = [256, 512, 1024, 2048, 4096], [256, 1024, 4096, 16384, 65536], 16
# The largest block to run, as rows times width².
LARGEST = {"cpu": 1024 * 4096**2, "cuda": 65536 * 4096**2}
LORA, OURS = "LoRA r=8", "svdtune"


def block_of_width(options: Options, width: int) -> Subject:
    config = SamVisionConfig(
        hidden_size=width,
        mlp_dim=4 * width,
        num_attention_heads=width // 64,
        image_size=SIDE * 16,
        attn_implementation="sdpa",
    )
    model = options.to_device(Output(SamVisionLayer(config, window_size=0)))
    return Subject(f"width {width}", model, SAM_TARGETS, options.to_device(torch.randn(1, SIDE, SIDE, width)))


def plot(timings_of: dict[tuple[int, int], Timings], options: Options) -> None:
    """Plots the ratio of our step to LoRA's over rows, one line per width."""
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for shade, width in enumerate(sorted({width for width, _ in timings_of}), start=2):
        rows = [rows for of_width, rows in timings_of if of_width == width]
        ratios = [statistics.median(timings_of[width, number].ratios(OURS, LORA)) for number in rows]
        axis.plot(rows, ratios, marker="o", color=plt.cm.Reds(shade / 7), label=f"width {width}")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=4)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set(
        xlabel="rows", ylabel="times LoRA r=8", title="A training step of a block of SAM's encoder", ylim=(0, 1.6)
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(results_folder(options) / "growth.png", dpi=120)
    plt.close(figure)


def measure(options: Options) -> Result:
    result = Result("growth")
    largest = LARGEST[options.device] // (4 if options.quick else 1)
    table, timings_of = [], {}
    for width in WIDTHS:
        if ROWS[0] * width**2 > largest:
            continue
        subject = block_of_width(options, width)
        models = {method: tuned(subject, method) for method in (LORA, OURS)}
        for rows in ROWS:
            if rows * width**2 > largest:
                continue
            x = options.to_device(torch.randn(rows // SIDE**2, SIDE, SIDE, width))
            steps = {method: training_step(model, x) for method, model in models.items()}
            timings = time_interleaved(steps, options.rounds_or(full=5, quick=5))
            timings_of[width, rows] = timings
            ours = next(row for row in timings.rows(LORA) if row[0] == OURS)
            table.append([str(width), f"{rows:,}", f"{timings.median(LORA):.4f}", *ours[1:]])
    columns = ["width", "rows", "LoRA r=8, seconds", "svdtune, seconds", "ratio", "least - most"]
    result.add_table("A training step of a block of SAM's encoder", columns, table)
    claims = [
        timings.claim(f"growth, worst of {len(timings_of)}: width {width}, {rows} rows", OURS, LORA, 1.3)
        for (width, rows), timings in timings_of.items()
    ]
    result.claims = [max(claims, key=lambda claim: claim.value)]
    plot(timings_of, options)
    result.data["seconds"] = [
        {"width": width, "rows": rows, **timings.seconds} for (width, rows), timings in timings_of.items()
    ]
    return result


if __name__ == "__main__":
    run(measure)
