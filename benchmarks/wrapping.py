"""What does it cost to wrap SAM's ViT-B, all its linear layers decomposed?

    python benchmarks/wrapping.py

Against `torch.linalg.svd` in float32 on the same weights, interleaved layer by layer of one block: its four shapes,
times twelve blocks. Random weights of the model's shapes and spread.
"""

from __future__ import annotations

import statistics
import time

import torch
from harness import machine

from svdtune.spectrum import Spectrum

SHAPES = {"qkv": (2304, 768), "proj": (768, 768), "lin1": (3072, 768), "lin2": (768, 3072)}
BLOCKS, ROUNDS = 12, 5


def seconds(call, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    call(weight)
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    print(f"{machine()}; {ROUNDS} rounds\n")
    print("| layer | Spectrum, s | torch.linalg.svd in float32, s | ratio |\n|---|---|---|---|")
    totals = []
    for name, shape in SHAPES.items():
        weights = [0.02 * torch.randn(1, *shape) for _ in range(ROUNDS)]
        ours = [seconds(Spectrum, weight) for weight in weights]
        theirs = [seconds(lambda weight: torch.linalg.svd(weight, full_matrices=False), weight) for weight in weights]
        mine, reference = statistics.median(ours), statistics.median(theirs)
        totals.append((mine, reference))
        print(f"| {name} {shape[0]} x {shape[1]} | {mine:.2f} | {reference:.2f} | {mine / reference:.2f} |")
    mine, reference = (BLOCKS * sum(column) for column in zip(*totals, strict=True))
    print(f"| all 48 | {mine:.1f} | {reference:.1f} | {mine / reference:.2f} |")


if __name__ == "__main__":
    main()
