"""Which operators take the time of a training step and of wrapping?

    python benchmarks/where_time_goes.py [--device cuda --dtype bfloat16]

The script reports the share of each torch operator, from torch.profiler. The model is three blocks of SAM's ViT-B
encoder at 256 px, batch 8 and 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from harness import Options, Result, run
from subjects import FROZEN, PUBLISHED, QUICK_BLOCKS, sam_encoder, training_step, tuned
from wrapping import wrap

SHOWN = 6


def shares(call: Callable[[], object], device: str) -> list[str]:
    """The operators that take most of the time, each with its share of the total."""
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        call()
    time_of = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    seconds = {event.key: getattr(event, time_of) for event in profiler.key_averages()}
    largest = sorted(seconds, key=lambda key: -seconds[key])[:SHOWN]
    return [f"{key.removeprefix('aten::')} {100 * seconds[key] / sum(seconds.values()):.0f} %" for key in largest]


def measure(options: Options) -> Result:
    result = Result("where_time_goes")
    rows = []
    for batch in (8, 1):
        subject = sam_encoder(options, batch=batch, blocks=QUICK_BLOCKS)
        for method in ("svdtune", "LoRA r=8", PUBLISHED, FROZEN):
            step = training_step(tuned(subject, method), subject.x)
            rows.append([f"step, batch {batch}, {method}", *shares(step, options.device)])
    rows.append(["wrapping", *shares(lambda: wrap(subject), options.device)])
    result.add_table("Operators by their share of the time", ["", *[""] * SHOWN], rows)
    return result


if __name__ == "__main__":
    run(measure)
