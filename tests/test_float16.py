"""float16 ends at 65504. A tuned layer is finite wherever its base layer, which sums in float32, is finite."""

import copy

import pytest
import torch
from torch import nn

from svdtune import SVDScaleShiftConfig
from svdtune.float16 import divisor_of_rows
from svdtune.kinds import LAYER_KINDS

# One feature of the input is far larger than the others, as in the residual streams of large models. It meets weights
# that are alike for all outputs, or one output.
OUTLIER = 15_000.0


def linear(out_features, in_features):
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    with torch.no_grad():
        layer.weight[:, 7] += 2.0
    return layer


def convolution(kernel_size, groups=1):
    layer = nn.Conv2d(32, 48, kernel_size, groups=groups)
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    with torch.no_grad():
        layer.weight[:, 7 % layer.weight.shape[1], 0, 0] += 2.0
    return layer


def with_outlier(*shape, dimension):
    x = torch.randn(*shape)
    x.select(dimension, 7).fill_(OUTLIER)
    return x


LAYERS = {
    "tall": (lambda: linear(256, 128), with_outlier(4, 128, dimension=1)),
    "wide": (lambda: linear(64, 256), with_outlier(4, 256, dimension=1)),
    "many rows": (lambda: linear(256, 128), with_outlier(600, 128, dimension=1)),
    "square, many rows": (lambda: linear(128, 128), with_outlier(2000, 128, dimension=1)),
    "large rows": (lambda: nn.Linear(512, 64), 12_000 * torch.randn(4, 512).sign()),
    "1x1": (lambda: convolution(1), with_outlier(2, 32, 5, 5, dimension=1)),
    "3x3": (lambda: convolution(3), with_outlier(2, 32, 5, 5, dimension=1)),
    "grouped": (lambda: convolution(3, groups=2), with_outlier(2, 32, 5, 5, dimension=1)),
}
each_layer = pytest.mark.parametrize("make_layer, x", LAYERS.values(), ids=LAYERS)
each_form = pytest.mark.parametrize("choices", [{}, {"one_sided": True}, {"rank": 20}], ids=str)


def tuned(base_layer, **choices):
    kind = LAYER_KINDS[type(base_layer)]
    return kind(base_layer.requires_grad_(False), "default", SVDScaleShiftConfig(**choices))


def learned_by(layer):
    return layer.svd_scale_shift_a["default"].weight, layer.svd_scale_shift_b["default"].weight


@each_form
@each_layer
def test_an_untrained_layer_is_finite_where_its_base_is(make_layer, x, choices, relative_error):
    base_layer = make_layer().half()
    expected = base_layer(x.half())
    assert expected.isfinite().all() and expected.abs().max() > 1000
    layer = tuned(base_layer, **choices)
    assert relative_error(layer(x.half()), expected) < 2e-3
    with torch.autocast("cpu", torch.float16):
        assert relative_error(tuned(base_layer.float(), **choices)(x), expected) < 2e-3


@each_form
@each_layer
def test_a_trained_layer_and_its_gradients_are_those_of_float64(make_layer, x, choices, train, relative_error):
    """The loss is scaled as in mixed precision; a mean over rows keeps sums of gradients in range."""
    exact = train(tuned(make_layer().half().double(), **choices))
    with torch.no_grad():
        for parameter in learned_by(exact):
            parameter.mul_(0.1)
    layer = tuned(copy.deepcopy(exact.get_base_layer()).half(), **choices)
    layer.load_state_dict(exact.state_dict())

    cotangent = torch.randn_like(exact(x.double())) * 2.0**6 / len(x)
    given = [x.half().requires_grad_(), *learned_by(layer)]
    right = [x.half().double().requires_grad_(), *learned_by(exact)]
    y, expected = layer(given[0]), exact(right[0])
    assert relative_error(y, expected) < 5e-3
    gradients = torch.autograd.grad(y, given, cotangent.half())
    for actual, gradient in zip(gradients, torch.autograd.grad(expected, right, cotangent), strict=True):
        assert actual.isfinite().all() and relative_error(actual, gradient) < 2e-2


def test_each_sample_of_a_batch_is_kept_in_range(relative_error):
    layer = tuned(linear(256, 128).half())
    x = with_outlier(3, 4, 128, dimension=2).half()
    x[1] /= OUTLIER
    layer.update_layer("other", SVDScaleShiftConfig())
    assert relative_error(layer(x, adapter_names=["default", "other", "__base__"]), layer.base_layer(x)) < 2e-3


def test_rows_of_usual_size_are_left_as_they_are():
    x, values = torch.randn(2, 4, 128).half(), 20 * torch.rand(64)
    assert torch.equal(divisor_of_rows(x, values), torch.ones(2, 4, 1).half())
    x[0, 1, 5] = OUTLIER
    assert (divisor_of_rows(x, values) > 1).flatten().tolist() == [False, True, *6 * [False]]
