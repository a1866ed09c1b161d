"""The forms of the product: their costs as counted, their table as documented, and which one each layer takes."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import svdtune.functional
from svdtune import SVDScaleShiftConfig
from svdtune.forms import DELTA, FACTORED, FORMS, ONE_SIDED_U, ONE_SIDED_V, REBUILT, choose, table
from svdtune.kinds import LAYER_KINDS, Linear
from svdtune.param_wrapper import ParamWrapper

KINDS = list(dict.fromkeys([*LAYER_KINDS.values(), ParamWrapper]))
each_form = pytest.mark.parametrize("form", FORMS, ids=str)


def tuned(base_layer, **choices):
    kind = LAYER_KINDS[type(base_layer)]
    return kind(base_layer.requires_grad_(False), "default", SVDScaleShiftConfig(**choices))


def layer_for(form, base_layer):
    """A tuned layer that holds what the form needs. All its singular values, from 2 to 1, can be divided by."""
    left, _, right = torch.linalg.svd(base_layer.weight.detach(), full_matrices=False)
    base_layer.weight.data = left * torch.linspace(2, 1, 24) @ right
    layer = tuned(base_layer, one_sided=form.holds != "both")
    assert layer.spectrum.sides == form.holds
    return layer


def base_for(form):
    return nn.Linear(24, 40) if form is not ONE_SIDED_U else nn.Linear(40, 24)


def test_the_table_in_the_docstring_is_that_of_the_forms():
    assert f"\n\n{table()}\n\n" in svdtune.functional.__doc__


@each_form
def test_the_formula_of_the_cost_is_the_cost(form):
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", form.step_cost).replace("in", "in_")
    for rows, out_features, in_features, rank in [(5, 24, 40, 7), (1, 40, 24, 24), (100, 8, 8, 8)]:
        sizes = {"N": rows, "out": out_features, "in_": in_features, "r": rank}
        assert eval(formula, sizes) == form.multiply_adds(rows, out_features, in_features, rank)


@each_form
@pytest.mark.parametrize("backward", [False, True])
def test_a_form_costs_the_multiply_adds_that_torch_counts(form, backward):
    layer = layer_for(form, base_for(form))
    x = torch.randn(9, layer.in_features, requires_grad=backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y = form.product(layer, x, layer.delta_of("default"))
        if backward:
            y.sum().backward()
    expected = form.multiply_adds(9, layer.out_features, layer.in_features, 24, backward)
    bias = layer.out_features * 24 if form is ONE_SIDED_U else 0  # Uᵀ bias, once
    assert counter.get_total_flops() == 2 * (expected + bias)


@each_form
def test_all_forms_are_one_product(form, train, paper_weight, relative_error):
    layer = train(layer_for(form, base_for(form)))
    x = torch.randn(9, layer.in_features)
    scale, shift = layer.svd_scale_shift_scale["default"], layer.svd_scale_shift_shift["default"]
    weight = paper_weight(layer.base_layer.weight, scale, shift)
    expected = x.double() @ weight.T + layer.bias.double()
    assert relative_error(form.product(layer, x, layer.delta_of("default")), expected) < 1e-6


@each_form
def test_a_copied_layer_takes_the_same_form(form):
    layer = layer_for(form, base_for(form))
    x = torch.randn(3, layer.in_features)
    taken = layer.form_for(x, layer.delta_of("default"))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.form_for(x, twin.delta_of("default")) is taken


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_kind_has_a_product_for_each_form_that_it_offers(kind):
    assert kind.forms
    if kind is not ParamWrapper:  # it builds W' whatever it holds
        assert {form for form in FORMS if hasattr(kind, form.hook)} == set(kind.forms)


# Which form a layer takes: what its weight is, what is asked for, and how often the base layer runs.
TAKEN = {
    "all values": (lambda: nn.Linear(24, 40), {}, FACTORED),
    "few values, tall": (lambda: nn.Linear(24, 40), {"rank": 4}, ONE_SIDED_V),
    "few values, wide": (lambda: nn.Linear(40, 24), {"rank": 4}, ONE_SIDED_U),
    "few values, square": (lambda: nn.Linear(24, 24), {"rank": 4}, ONE_SIDED_V),
    "on demand, tall": (lambda: nn.Linear(24, 40), {"one_sided": True}, ONE_SIDED_V),
    "on demand, wide": (lambda: nn.Linear(40, 24), {"one_sided": True}, ONE_SIDED_U),
    "convolution": (lambda: nn.Conv2d(4, 10, 3), {}, FACTORED),
    "convolution, few values": (lambda: nn.Conv2d(4, 10, 3), {"rank": 4}, ONE_SIDED_U),
    "convolution of patches, few values": (lambda: nn.Conv2d(3, 60, 4), {"rank": 4}, DELTA),
    "convolution of patches, on demand": (lambda: nn.Conv2d(3, 60, 4), {"one_sided": True}, FACTORED),
    "embedding": (lambda: nn.Embedding(40, 24), {}, ONE_SIDED_V),
    "embedding of few tokens": (lambda: nn.Embedding(16, 24), {}, DELTA),
}


@pytest.mark.parametrize("make_layer, choices, form", TAKEN.values(), ids=TAKEN)
def test_a_layer_takes_and_shows_the_form_of_its_case(make_layer, choices, form):
    layer = tuned(make_layer(), **choices)
    assert f"form={form.name}" in layer.extra_repr()
    assert layer.form_for(torch.ones(1, 24), layer.delta_of("default")) is form
    assert layer.spectrum.sides == form.holds


def test_a_base_layer_with_a_hook_is_called_in_the_delta_form():
    layer = tuned(nn.Linear(24, 24))
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert layer.form_for(torch.ones(1000, 24), layer.delta_of("default")) is DELTA


def test_a_row_of_values_per_sample_is_not_rebuilt():
    layer, x = tuned(nn.Linear(24, 24)), torch.ones(1000, 1, 24)
    delta = layer.delta_of("default").detach()
    assert layer.form_for(x, delta) is REBUILT
    assert layer.form_for(x, delta.expand(1000, -1)) is FACTORED


@pytest.mark.parametrize("size", [(24, 24), (96, 24), (24, 96), (30, 24)], ids=str)
@pytest.mark.parametrize("rows", [1, 24, 80, 1000])
@pytest.mark.parametrize("backward", [False, True])
def test_the_form_of_fewer_multiply_adds_is_taken_unless_it_keeps_more(size, rows, backward):
    costs = {form: form.multiply_adds(rows, *size, 24, backward) for form in (FACTORED, REBUILT)}
    keeps_more = backward and size[1] > 24
    expected = REBUILT if costs[REBUILT] < costs[FACTORED] and not keeps_more else FACTORED
    assert choose(Linear.forms, size, 24, held="both", rows=rows, backward=backward) is expected
