"""Does the rule that chooses how a layer computes its product choose the fastest way?

    python benchmarks/forms.py [--quick] [--device cuda --dtype bfloat16]

A linear layer of which all singular values are tuned, through its factors and with its weight rebuilt, over shapes and
rows: forward and backward, and forward alone. The rule counts multiply-adds, and never takes the form that keeps more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness import Claim, Options, Result, run, time_interleaved
from svdtune.functional import rebuilding_costs_less, rebuilt_linear, scaled_linear

SHAPES = {"square": (768, 768), "to query, key, value": (2304, 768), "up": (3072, 768), "down": (768, 3072)}
ROWS = [64, 256, 1024, 4096, 16384]
FACTORED, REBUILT = "factored", "rebuilt"


def calls(options: Options, shape: tuple[int, int], rows: int, backward: bool) -> dict:
    out_features, in_features = shape
    rank = min(shape)
    weight, left, right = (
        options.to_device(torch.randn(size)) for size in (shape, (out_features, rank), (rank, in_features))
    )
    x = options.to_device(torch.randn(rows, in_features)).requires_grad_(backward)
    gradient = options.to_device(torch.randn(rows, out_features))
    values = torch.rand(rank, device=options.device, requires_grad=backward)

    def computed(y: Tensor) -> None:
        if backward:
            torch.autograd.grad(y, [x, values], gradient)

    return {
        FACTORED: lambda: computed(scaled_linear(x, left, values, right)),
        REBUILT: lambda: computed(rebuilt_linear(x, weight, left, values, right)),
    }


def measure(options: Options) -> Result:
    result = Result("forms")
    rows_of_table, losses = [], []
    for name, shape in SHAPES.items():
        for rows in ROWS[: 4 if options.quick else None]:
            for backward in (True, False):
                with torch.set_grad_enabled(backward):
                    contenders = calls(options, shape, rows, backward)
                    timings = time_interleaved(contenders, options.rounds_or(full=7, quick=3))
                taken = REBUILT if rebuilding_costs_less(rows, *shape, backward) else FACTORED
                keeps_more = backward and shape[1] > shape[0]
                fastest = FACTORED if keeps_more else min(contenders, key=timings.median)
                loss = timings.median(taken) / timings.median(fastest)
                losses.append(loss)
                times = [f"{1000 * timings.median(form):.2f}" for form in (FACTORED, REBUILT)]
                what = "step" if backward else "forward"
                rows_of_table.append([name, f"{rows:,}", what, *times, taken, f"{loss:.2f}"])
    columns = ["layer", "rows", "", "factored, ms", "rebuilt, ms", "taken", "times the fastest"]
    result.add_table("The two forms at full rank (768), where neither keeps more than x V", columns, rows_of_table)
    right = sum(loss < 1.05 for loss in losses)
    print(f"\nThe rule's form is the fastest, or within 5 % of it, in {right} of {len(losses)}.")
    result.claims.append(Claim(f"the rule's form, worst of {len(losses)}", "the fastest", max(losses), 1.1))
    result.data["losses"] = losses
    return result


if __name__ == "__main__":
    run(measure)
