import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdtune.functional import (
    add_scaled_channels,
    delta_of_singular_values,
    rebuilt_linear,
    scaled_convolution,
    scaled_linear,
    weight_change,
)


def test_delta_is_that_of_the_papers_equation_and_relu_clips():
    singular_values = torch.tensor([3.0, 2.0, 1.0, 0.5])
    scale, shift = torch.tensor([2.0, 0.5, 1.0, -1.0]), torch.tensor([-1.0, 0.0, -4.0, 0.25])
    delta = delta_of_singular_values(singular_values, scale - 1, shift)
    assert (singular_values + delta).tolist() == [5.0, 1.0, 0.0, 0.0]
    delta = delta_of_singular_values(singular_values, scale - 1, shift, "none")
    assert (singular_values + delta).tolist() == [5.0, 1.0, -3.0, -0.25]


def test_nothing_changes_at_the_start(dtype):
    assert not delta_of_singular_values(torch.rand(8, dtype=dtype), *torch.zeros(2, 8, dtype=dtype)).any()


def test_a_clipped_value_gets_no_gradient_and_a_broken_one_is_seen():
    a, b = torch.tensor([0.0, -2.0, -1.0], requires_grad=True), torch.zeros(3, requires_grad=True)
    delta_of_singular_values(torch.tensor([3.0, 2.0, 1.0]), a, b).sum().backward()
    assert (a.grad.tolist(), b.grad.tolist()) == ([3.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    assert delta_of_singular_values(torch.ones(1), torch.tensor([float("nan")])).isnan()


@pytest.mark.parametrize("rows", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 9), (9, 4)], ids=["wide", "tall"])
def test_scaled_linear_is_the_product_with_the_rebuilt_weight(size, bias, rows):
    (out_features, in_features), rank = size, min(size)
    left, right = torch.randn(out_features, rank).double(), torch.randn(rank, in_features).double()
    values, x = torch.rand(rank).double(), torch.randn(*rows, in_features).double()
    bias = torch.randn(out_features).double() if bias else None

    y = scaled_linear(x, left, values, right, bias)
    torch.testing.assert_close(y, F.linear(x, left @ values.diag() @ right, bias), rtol=1e-12, atol=1e-12)


# Few rows multiply the values to the rows, and many multiply them to the vectors.
@pytest.mark.parametrize("shape", [(2, 6), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_scaled_linear_has_the_right_gradients(check, shape):
    left, right = torch.randn(4, 3).double(), torch.randn(3, 6).double()
    inputs = [torch.randn(*shape).double().requires_grad_() for shape in [shape, (3,), (4,)]]
    assert check(lambda x, values, bias: scaled_linear(x, left, values, right, bias), inputs)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_rebuilt_linear_has_the_right_gradients(check):
    weight, left, right = torch.randn(4, 6).double(), torch.randn(4, 3).double(), torch.randn(3, 6).double()
    inputs = [torch.randn(*shape).double().requires_grad_() for shape in [(2, 5, 6), (3,), (4,)]]
    assert check(lambda x, delta, bias: rebuilt_linear(x, weight, left, delta, right, bias), inputs)


def test_each_samples_gradient_is_had_by_vmap():
    left, right, x = torch.randn(4, 3), torch.randn(3, 6), torch.randn(5, 7, 6)
    values = torch.rand(3)

    def loss(values, x):
        return scaled_linear(x, left, values, right).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    alone = torch.stack([torch.func.grad(loss)(values, sample) for sample in x])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("bias", [True, False])
def test_add_scaled_channels_is_the_convolution_with_a_weight_changed_on_its_left(bias):
    convolution = nn.Conv2d(4, 6, 3, groups=2, bias=bias).double().requires_grad_(False)
    x, left, values = torch.randn(2, 4, 8, 7).double(), torch.randn(2, 3, 3).double(), torch.randn(6).double()
    y = add_scaled_channels(convolution(x), left, values, convolution.bias, dimensions=2)
    change = left @ torch.diag_embed(values.view(2, 3)) @ left.mT @ convolution.weight.view(2, 3, -1)
    convolution.weight += change.reshape(convolution.weight.shape)
    torch.testing.assert_close(y, convolution(x), rtol=1e-12, atol=1e-12)


def test_float32_values_do_not_widen_a_bfloat16_product():
    x, left, right = (torch.randn(3, 3).bfloat16() for _ in range(3))
    assert scaled_linear(x, left, torch.rand(3), right, None).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, groups=2, padding="same"),
        nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="circular", bias=False),
    ],
    ids=str,
)
def test_scaled_convolution_is_the_convolution_with_the_rebuilt_weight(convolution):
    convolution = convolution.double().requires_grad_(False)
    groups, x = convolution.groups, torch.randn(2, 4, 9, 8).double()
    out_of_group, in_of_group = convolution.out_channels // groups, convolution.weight[0].numel()
    rank = min(out_of_group, in_of_group)
    left, right = torch.randn(groups, out_of_group, rank).double(), torch.randn(groups, rank, in_of_group).double()
    values = torch.rand(groups * rank).double()

    y = scaled_convolution(x, left, values, right, convolution.bias, convolution)
    rebuilt = left @ torch.diag_embed(values.view(groups, rank)) @ right
    convolution.weight.copy_(rebuilt.reshape(convolution.weight.shape))
    torch.testing.assert_close(y, convolution(x), rtol=1e-12, atol=1e-12)


def test_scaled_convolution_takes_one_image_without_a_batch():
    convolution, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(4, 8, 8)
    left, right, values = torch.randn(2, 3, 3), torch.randn(2, 3, 18), torch.rand(6)
    batch_of_one = scaled_convolution(x[None], left, values, right, None, convolution)
    torch.testing.assert_close(scaled_convolution(x, left, values, right, None, convolution), batch_of_one[0])


def test_weight_change_is_the_difference_of_the_rebuilt_weights():
    left, right = torch.randn(2, 5, 3).double(), torch.randn(2, 3, 4).double()
    delta = torch.randn(6).double()
    expected = torch.stack([left[group] @ delta[3 * group :][:3].diag() @ right[group] for group in range(2)])
    torch.testing.assert_close(weight_change(left, delta, right), expected, rtol=1e-12, atol=1e-12)


def test_weight_change_of_bfloat16_factors_is_multiplied_in_float32():
    left, right, delta = torch.randn(1, 5, 3).bfloat16(), torch.randn(1, 3, 4).bfloat16(), torch.randn(3)
    expected = left.double() * delta.double() @ right.double()
    torch.testing.assert_close(weight_change(left, delta, right), expected.float(), rtol=1e-5, atol=1e-6)


def test_weight_change_of_an_untrained_adapter_is_zero_to_the_last_bit(dtype):
    left, right = torch.randn(1, 5, 3).to(dtype), torch.randn(1, 3, 4).to(dtype)
    change = weight_change(left, torch.zeros(3), right)
    assert change.dtype is torch.float32
    assert torch.equal(change, torch.zeros(1, 5, 4))
