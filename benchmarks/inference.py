"""How long does inference take with an adapter, merged and not merged?

    python benchmarks/inference.py [--quick] [--device cuda --dtype bfloat16]

The model is SAM's ViT-B encoder at 256 px, batch 8, with all linear layers of its blocks tuned.
"""

from __future__ import annotations

import copy
from functools import partial

import torch

from harness import Options, Result, run, time_interleaved
from subjects import QUICK_BLOCKS, sam_encoder, tuned

PLAIN, MERGED, OURS, LORA = "the plain model", "svdtune, merged", "svdtune, not merged", "LoRA r=8, not merged"


def measure(options: Options) -> Result:
    result = Result("inference")
    subject = sam_encoder(options, blocks=QUICK_BLOCKS if options.quick else 12)
    ours = tuned(subject, "svdtune")
    models = {
        PLAIN: subject.model,
        MERGED: copy.deepcopy(ours).merge_and_unload(),
        OURS: ours,
        LORA: tuned(subject, "LoRA r=8"),
        "svdtune, one-sided, not merged": tuned(subject, "svdtune, one-sided"),
        "svdtune, rank=64, not merged": tuned(subject, "svdtune, rank=64"),
        "LoRA r=64, not merged": tuned(subject, "LoRA r=64"),
    }
    calls = {name: partial(model.eval(), subject.x) for name, model in models.items()}
    with torch.inference_mode():
        timings = time_interleaved(calls, options.rounds_or(full=7, quick=7))
    columns = ["a prediction of", "seconds", "times the plain model", "least - most"]
    result.add_table(subject.name, columns, timings.rows(PLAIN))
    # The merged model is the plain model with other values, so any ratio above 1.00 is noise of the machine.
    result.claims = [
        timings.claim("inference, merged", MERGED, PLAIN, 1.0),
        timings.claim("inference, one adapter, not merged", OURS, LORA, 1.1),
    ]
    result.data["seconds"] = timings.seconds
    return result


if __name__ == "__main__":
    run(measure)
