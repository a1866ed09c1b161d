"""Which form of the product is the fastest, and does `svdtune.forms.choose` take it?

    python benchmarks/forms.py [--quick] [--device cuda --dtype bfloat16]

A linear layer of which all singular values are tuned, in each form, over shapes and numbers of rows: forward and
backward, and forward alone. Between the factored and the rebuilt form, `choose` takes the one of fewer multiply-adds,
unless it keeps more. It takes the other forms for what they hold, so they are measured but no claim is made of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness import Claim, Options, Result, run, time_interleaved
from svdtune import SVDScaleShiftConfig
from svdtune.forms import FACTORED, FORMS, ONE_SIDED_U, ONE_SIDED_V, REBUILT, Form
from svdtune.kinds import Linear

SHAPES = {"square": (768, 768), "to query, key, value": (2304, 768), "up": (3072, 768), "down": (768, 3072)}
ROWS = [64, 256, 1024, 4096, 16384]


def layers_of(shape: tuple[int, int], options: Options) -> dict[str, Linear]:
    """A tuned layer with both sides' vectors, and one with the smaller side's, by whose vectors they hold."""
    out_features, in_features = shape
    base_layer = options.to_device(nn.Linear(in_features, out_features)).requires_grad_(False)
    layers = [Linear(base_layer, "default", SVDScaleShiftConfig(one_sided=one_sided)) for one_sided in (False, True)]
    return {layer.spectrum.sides: layer for layer in layers}


def forms_of(shape: tuple[int, int]) -> list[Form]:
    """The forms that a layer of this shape may take: a one-sided form holds the shorter vectors."""
    longer = ONE_SIDED_V if shape[0] < shape[1] else ONE_SIDED_U
    return [form for form in FORMS if form is not longer]


def calls(options: Options, shape: tuple[int, int], layers: dict[str, Linear], x: Tensor, backward: bool) -> dict:
    """A call of each form's product, by the form's name."""
    gradient = torch.randn_like(x[:, :1].expand(-1, shape[0]))

    def call(form: Form) -> None:
        layer = layers[form.holds]
        delta = torch.full_like(layer.spectrum.singular_values, 0.1).requires_grad_(backward)
        y = form.product(layer, x, delta)
        if backward:
            torch.autograd.grad(y, [x, delta], gradient)

    return {form.name: lambda form=form: call(form) for form in forms_of(shape)}


def measure(options: Options) -> Result:
    result = Result("forms")
    rows_of_table, losses = [], []
    for name, shape in SHAPES.items():
        layers = layers_of(shape, options)
        both = layers["both"]
        for rows in ROWS[: 4 if options.quick else None]:
            for backward in (True, False):
                x = options.to_device(torch.randn(rows, shape[1])).requires_grad_(backward)
                with torch.set_grad_enabled(backward):
                    timings = time_interleaved(
                        calls(options, shape, layers, x, backward), options.rounds_or(full=7, quick=3)
                    )
                    taken = both.form_for(x, both.spectrum.singular_values)
                keeps_more = backward and REBUILT.keeps_input and shape[1] > shape[0]
                eligible = [FACTORED] if keeps_more else [FACTORED, REBUILT]
                loss = timings.median(taken.name) / min(timings.median(form.name) for form in eligible)
                losses.append(loss)
                times = [
                    f"{1000 * timings.median(form.name):.2f}" if form.name in timings.seconds else "" for form in FORMS
                ]
                what = "step" if backward else "forward"
                rows_of_table.append([name, f"{rows:,}", what, *times, taken.name, f"{loss:.2f}"])
    columns = ["layer", "rows", "", *(f"{form}, ms" for form in FORMS), "taken", "times the fastest"]
    caption = "All forms at full rank (768). The fastest is that of factored and rebuilt which keeps no more than x V"
    result.add_table(caption, columns, rows_of_table)
    right = sum(loss < 1.05 for loss in losses)
    print(f"\nThe form taken is the fastest, or within 5 % of it, in {right} of {len(losses)}.")
    result.claims.append(Claim(f"the form taken, worst of {len(losses)}", "the fastest", max(losses), 1.1))
    result.data["losses"] = losses
    return result


if __name__ == "__main__":
    run(measure)
