"""How long does a training step take, compared with LoRA, full fine-tuning and the published way?

    python benchmarks/step.py [--quick] [--device cuda --dtype bfloat16]

The model is SAM's ViT-B encoder at 256 px, batch 8 and 1, with all linear layers of its blocks tuned. A step is a
forward and a backward pass.
"""

from __future__ import annotations

from harness import Options, Result, run, time_interleaved
from subjects import FROZEN, FULL, PUBLISHED, QUICK_BLOCKS, sam_encoder, training_step, tuned

METHODS_OF_BATCH = {
    8: ["LoRA r=8", "svdtune", "LoRA r=64", "svdtune, rank=64", "svdtune, one-sided", FULL, PUBLISHED, FROZEN],
    1: ["LoRA r=8", "svdtune", PUBLISHED],
}


def measure(options: Options) -> Result:
    result = Result("step")
    blocks = QUICK_BLOCKS if options.quick else 12
    for batch, methods in METHODS_OF_BATCH.items():
        subject = sam_encoder(options, batch=batch, blocks=blocks)
        steps = {method: training_step(tuned(subject, method), subject.x) for method in methods}
        timings = time_interleaved(steps, options.rounds_or(full=5 if batch > 1 else 11, quick=3 if batch > 1 else 7))
        columns = ["a training step of", "seconds", "times LoRA r=8", "least - most"]
        result.add_table(subject.name, columns, timings.rows("LoRA r=8"))
        name = f"training step, ViT-B encoder, batch {batch}"
        if batch > 1:
            reach = 1.05 if options.device == "cpu" else 1.0
            result.claims += [
                timings.claim(f"{name}, full rank", "svdtune", "LoRA r=8", reach),
                timings.claim(f"{name}, `rank=64`", "svdtune, rank=64", "LoRA r=64", 1.0),
                timings.claim(f"{name}, full rank", "svdtune", PUBLISHED, 0.65),
                timings.claim(f"{name}, full rank", "svdtune", FULL, 0.9),
            ]
        else:
            result.claims.append(timings.claim(f"{name}, full rank", "svdtune", PUBLISHED, 0.35))
        result.data[f"batch {batch}"] = timings.seconds
    return result


if __name__ == "__main__":
    run(measure)
