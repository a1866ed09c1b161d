"""The forms of the product: what each holds, what it costs, and which one a layer takes.

Each `Form` is one way to compute y = W' x with W' = U diag(S + delta) Vᵀ. All forms give the same y up to rounding.
A kind of layer lists the forms that it offers (`SVDScaleShiftLayer.forms`) and has one product for each.

`choose` makes every decision: before the decomposition which vectors to hold, and at each forward pass which product
to run. `table` shows all forms; the docstring of `svdtune.functional` contains it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from svdtune.functional import known_to_hold

# Whose vectors a layer holds: U and Vᵀ, U alone ("left"), or Vᵀ alone ("right").
Sides = Literal["both", "left", "right"]
VECTORS: dict[Sides, str] = {"both": "U, V", "left": "U", "right": "V"}


# Compared by identity: `choose` runs at every forward pass.
@dataclass(frozen=True, eq=False, repr=False)
class Form:
    """One form of the product.

    Attributes:
        name: Its name in tables, benchmarks and the repr of a layer.
        formula: What it computes.
        holds: Whose singular vectors it needs.
        runs_base_layer: Whether it computes W x by a call of the base layer, or replaces that call.
        keeps_input: Whether the backward pass keeps x (N, in); the other forms keep x V (N, r).
        hook: The method of a layer that computes it.
        forward_cost: Multiply-adds of the forward pass, from N rows, out, in and r.
        passes: How many times the forward pass's multiply-adds a training step takes.
        step_cost: The multiply-adds of a training step as a formula.
        taken_where: When `choose` takes it.
    """

    name: str
    formula: str
    holds: Sides
    runs_base_layer: bool
    hook: str
    forward_cost: Callable[[int, int, int, int], int]
    passes: int
    step_cost: str
    taken_where: str
    keeps_input: bool = False

    def multiply_adds(self, rows: int, out_features: int, in_features: int, rank: int, backward: bool = True) -> int:
        """How many multiply-adds a training step takes, or the forward pass alone without ``backward``."""
        forward = self.forward_cost(rows, out_features, in_features, rank)
        return self.passes * forward if backward else forward

    def product(self, layer: Any, x: Tensor, delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, with its singular values changed by ``delta``, (g * rank,) or (B, g * rank).

        Further arguments go to the base layer, if this form calls it.
        """
        compute = getattr(layer, self.hook)
        return compute(x, delta, *args, **kwargs) if self.runs_base_layer else compute(x, delta)

    def __repr__(self) -> str:
        return self.name


FACTORED = Form(
    name="factored",
    formula="U diag(S + delta) Vᵀ x",
    holds="both",
    runs_base_layer=False,
    hook="factored_product",
    forward_cost=lambda rows, out_features, in_features, rank: rows * rank * (out_features + in_features),
    passes=2,
    step_cost="2 N r (out + in)",
    taken_where="all values are tuned",
)
REBUILT = Form(
    name="rebuilt",
    formula="(W + U diag(delta) Vᵀ) x",
    holds="both",
    runs_base_layer=False,
    hook="rebuilt_product",
    # N products with W', and r with which W' is built; the backward pass builds it again.
    forward_cost=lambda rows, out_features, in_features, rank: (rows + rank) * out_features * in_features,
    passes=3,
    step_cost="3 out in (N + r)",
    taken_where="it costs less, keeps no more",
    keeps_input=True,
)
ONE_SIDED_V = Form(
    name="one-sided (V)",
    formula="W (x + V diag(delta/S) Vᵀ x)",
    holds="right",
    runs_base_layer=True,
    hook="right_sided_product",
    forward_cost=lambda rows, out_features, in_features, rank: rows * in_features * (out_features + 2 * rank),
    passes=2,
    step_cost="2 N out in + 4 N r in",
    taken_where="few values, packed W, on demand",
)
ONE_SIDED_U = Form(
    name="one-sided (U)",
    formula="W x + U diag(delta/S) Uᵀ W x",
    holds="left",
    runs_base_layer=True,
    hook="left_sided_product",
    forward_cost=lambda rows, out_features, in_features, rank: rows * out_features * (in_features + 2 * rank),
    passes=2,
    step_cost="2 N out in + 4 N r out",
    taken_where="the same, where out < in",
)
DELTA = Form(
    name="delta",
    formula="W x + U diag(delta) Vᵀ x",
    holds="both",
    runs_base_layer=True,
    hook="delta_product",
    forward_cost=lambda rows, out_features, in_features, rank: (
        rows * out_features * in_features + rows * rank * (out_features + in_features)
    ),
    passes=2,
    step_cost="2 N out in + 2 N r (out + in)",
    taken_where="no other form can be",
)
FORMS = (FACTORED, REBUILT, ONE_SIDED_V, ONE_SIDED_U, DELTA)


def choose(
    offered: tuple[Form, ...],
    shape: tuple[int, int],
    rank: int,
    *,
    held: Sides | None = None,
    one_sided: bool = False,
    base_layer_runs: bool = False,
    rows: int | None = None,
    backward: bool = True,
) -> Form:
    """The form that a layer takes.

    Args:
        offered: The forms of its kind.
        shape: (out, in) of one matrix.
        rank: How many singular values of a matrix are tuned.
        held: Whose vectors the layer holds; None before its weight is decomposed, when all forms can be had.
        one_sided: Whether to hold the vectors of one side only, if the kind offers it.
        base_layer_runs: Whether the base layer must compute W x itself: its weight is packed, or it has hooks.
        rows: How many rows W' can be rebuilt for; None if that is unknown, or if W' cannot be rebuilt.
        backward: Whether a backward pass follows.
    """
    smaller = min(shape)
    if held in (None, "both") and not one_sided:
        if FACTORED not in offered:
            # A module multiplies with its bare parameter itself, so W' has to be there.
            if REBUILT in offered:
                return REBUILT
        # Few singular values do not make up W, so only all of them replace the base layer's own product.
        elif rank >= smaller and not base_layer_runs:
            rebuilds = REBUILT in offered and rows is not None and _rebuilding_pays(rows, shape, backward)
            return REBUILT if rebuilds else FACTORED
    for form in offered:
        length = shape[0] if form.holds == "left" else shape[1]
        # Before the decomposition: the side whose vectors are shorter, which hold and cost less.
        if form.holds != "both" and (length == smaller if held is None else form.holds == held):
            return form
    return DELTA


def table() -> str:
    """All forms as a table, for docstrings."""
    titles = ("form", "product", "multiply-adds per step", "holds", "taken where")
    rows = [(form.name, form.formula, form.step_cost, VECTORS[form.holds], form.taken_where) for form in FORMS]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (titles, *rows)]
    return "\n".join(f"    {line}" for line in lines)


def _rebuilding_pays(rows: int, shape: tuple[int, int], backward: bool) -> bool:
    """Whether the rebuilt form takes fewer multiply-adds than the factored one at full rank, and keeps no more.

    For the forward pass alone it pays with more rows than the larger side. With the backward pass it can only pay
    where the weight is nearly square. There it keeps x (N, in) in place of x V (N, r), so never where in > r.
    """
    rank = min(shape)
    if backward and REBUILT.keeps_input and shape[1] > rank:
        return False
    rebuilt = REBUILT.multiply_adds(rows, *shape, rank, backward)
    return known_to_hold(rebuilt < FACTORED.multiply_adds(rows, *shape, rank, backward))
