"""How long does it take to wrap SAM's ViT-B, the first time and from the cache?

    python benchmarks/wrapping.py [--quick] [--device cuda]

The baseline is `torch.linalg.svd` in float32 of the same 48 weights. Both take turns, one block at a time.
"""

from __future__ import annotations

import tempfile

import torch
from peft import get_peft_model
from torch import nn

from harness import Options, Result, run, time_interleaved
from subjects import QUICK_BLOCKS, SAM_TARGETS, Subject, ours, sam_encoder, tuned_layers

# Number of four-byte values in a memory page.
PAGE = 1024
FIRST, CACHED, LAPACK = "wrapping, first time", "wrapping, from the cache", "torch.linalg.svd in float32"


def wrap(subject: Subject, cache: str | None = None) -> None:
    """Wraps the model, reads one value per page of the vectors, and unwraps the model."""
    model = get_peft_model(subject.model, ours(svd_cache=cache)(subject.targets))
    for layer in tuned_layers(model):
        # What comes from the cache is mapped into memory, and read only now.
        for vectors in layer.spectrum.held_vectors:
            vectors.flatten()[::PAGE].sum()
    model.unload()


def decompose(subject: Subject) -> None:
    for name, module in subject.model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in SAM_TARGETS:
            torch.linalg.svd(module.weight.detach().float(), full_matrices=False)


def measure(options: Options) -> Result:
    result = Result("wrapping")
    subject = sam_encoder(options, batch=1, blocks=QUICK_BLOCKS if options.quick else 12)
    with tempfile.TemporaryDirectory() as cache:
        wrap(subject, cache)
        calls = {
            LAPACK: lambda: decompose(subject),
            FIRST: lambda: wrap(subject),
            CACHED: lambda: wrap(subject, cache),
        }
        timings = time_interleaved(calls, options.rounds_or(full=5, quick=3))
    columns = ["", "seconds", "times torch.linalg.svd", "least - most"]
    result.add_table(subject.name, columns, timings.rows(LAPACK))
    result.claims = [
        timings.claim("wrapping SAM ViT-B, first time", FIRST, LAPACK, 0.5),
        timings.claim("wrapping again, from the cache", CACHED, FIRST, 0.1),
    ]
    result.data["seconds"] = timings.seconds
    return result


if __name__ == "__main__":
    run(measure)
