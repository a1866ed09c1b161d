"""Other code that modifies or reads a tuned layer or its base gets the results of the paper's weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from svdtune import SVDScaleShiftConfig

each_form = pytest.mark.parametrize("choices", [{}, {"one_sided": True}, {"rank": 3}], ids=str)


def tuned(module, train, **choices):
    model = train(get_peft_model(nn.Sequential(module), SVDScaleShiftConfig(target_modules=["0"], **choices)))
    return model, model.base_model.model[0]


def papers_weight(layer, paper_weight):
    """W' of the weight that the base layer holds now."""
    weight, count = layer.base_layer.weight, layer.rank["default"]
    scale, shift = torch.ones(min(weight.shape)), torch.zeros(min(weight.shape))
    scale[:count] = layer.svd_scale_shift_scale["default"].detach()
    shift[:count] = layer.svd_scale_shift_shift["default"].detach()
    return paper_weight(weight, scale, shift)


@each_form
@pytest.mark.parametrize("rows", [(2, 5), (60, 5)], ids=["few rows", "many rows"])
def test_an_output_may_be_changed_in_place(rows, choices, train):
    model, _ = tuned(nn.Linear(8, 8), train, **choices)
    x = torch.randn(*rows, 8)
    gradients = []
    for activation in (nn.ReLU(inplace=True), nn.ReLU()):
        y = activation(model(x)).square().sum()
        gradients.append(torch.autograd.grad(y, [p for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients)


@each_form
@pytest.mark.parametrize("change", ["scaled", "one row", "replaced twice", "loaded"])
def test_whatever_happens_to_the_base_weight_is_followed(change, choices, dtype, train, paper_weight, relative_error):
    model, layer = tuned(nn.Linear(24, 16).to(dtype), train, **choices)
    x, base = torch.randn(5, 24).to(dtype), layer.base_layer
    with torch.no_grad():
        if change == "scaled":
            base.weight.mul_(0.7)
        elif change == "one row":
            base.weight[3] = torch.randn(24)
        elif change == "replaced twice":
            for _ in range(2):
                base.weight = nn.Parameter(torch.randn(16, 24).to(dtype), requires_grad=False)
                model(x)
        else:
            base.load_state_dict({"weight": torch.randn(16, 24).to(dtype), "bias": base.bias.clone()}, assign=True)
    weight = papers_weight(layer, paper_weight)
    expected = F.linear(x.double(), weight, base.bias.double())
    precision = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    merged = copy.deepcopy(model).merge_and_unload()  # without a forward in between
    assert relative_error(merged[0].weight, weight) < precision
    assert relative_error(model(x), expected) < precision


@each_form
def test_a_base_weight_that_learns_gets_its_gradient(choices, train):
    model, layer = tuned(nn.Linear(8, 6), train, **choices)
    layer.base_layer.weight.requires_grad_()
    model(torch.randn(3, 8)).square().sum().backward()
    assert layer.base_layer.weight.grad.any()


@each_form
def test_hooks_of_the_base_layer_are_called(choices, train):
    _, layer = tuned(nn.Linear(8, 6), train, **choices)
    called = []
    layer.base_layer.register_full_backward_hook(lambda *_: called.append("backward"))
    layer.base_layer.register_forward_hook(lambda *_: called.append("forward"))
    layer(torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert called == ["forward", "backward"]


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0):
        return scale * F.linear(x, self.weight, self.bias)


class Dropping(nn.Linear):
    def forward(self, x):
        return F.dropout(F.linear(x, self.weight, self.bias), 0.5, self.training)


@each_form
def test_a_forward_that_looks_like_a_product_when_it_is_tried_still_runs(choices, train):
    _, layer = tuned(Scaled(8, 8), train, **choices)
    x = torch.randn(3, 8)
    assert (layer(x, scale=0.0) - layer(x)).abs().max() > 0.1
    model, layer = tuned(Dropping(8, 8).eval(), train, **choices)
    layer.eval()
    torch.testing.assert_close(model(x), copy.deepcopy(model).merge_and_unload()(x))
    base_outputs = []
    layer.base_layer.register_forward_hook(lambda module, args, output: base_outputs.append(output))
    model.train()(x)
    assert (base_outputs[0] == 0).any()


def test_an_attribute_called_embed_scale_does_not_make_a_product_of_anything(train):
    class Odd(nn.Linear):
        embed_scale = 3.0

        def forward(self, x):
            return F.linear(x, self.weight, self.bias) * self.embed_scale

    with pytest.raises(TypeError, match="does not compute the same"):
        tuned(Odd(8, 8), train)


@pytest.mark.parametrize(
    "spoil",
    [weight_norm, parametrizations.weight_norm, lambda linear: prune.l1_unstructured(linear, "weight", 0.3)],
    ids=["weight norm", "parametrization", "pruning"],
)
def test_a_weight_that_is_computed_after_wrapping_is_refused(spoil, train):
    model, layer = tuned(nn.Linear(8, 6), train)
    spoil(layer.base_layer)
    for use in (lambda: model(torch.randn(3, 8)), model.merge_and_unload):
        with pytest.raises(TypeError, match="its weight is computed from other parameters"):
            use()


def test_an_attention_with_a_computed_weight_is_refused(train):
    attention = parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight")
    with pytest.raises(TypeError, match="in_proj_weight is computed from other parameters"):
        tuned(attention, train)


def test_a_weight_that_is_read_can_be_differentiated_twice(train):
    _, layer = tuned(nn.Linear(5, 4).double(), train)
    layer.double()
    a, x = layer.svd_scale_shift_a["default"].weight, torch.randn(3, 5).double()

    def gradient():
        value = (torch.tanh(layer(x)) @ layer.weight).square().sum()
        return torch.autograd.grad(value, a, create_graph=True)[0]

    second = torch.stack([torch.autograd.grad(gradient()[row], a)[0] for row in range(len(a))])
    for column in range(len(a)):
        steps = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                a[column] += step
            steps.append(gradient().detach())
            with torch.no_grad():
                a[column] -= step
        torch.testing.assert_close(second[:, column], (steps[0] - steps[1]) / 2e-5, rtol=1e-5, atol=1e-6)
