"""medical_gradient_shares.py on gradients with known parts."""

import pytest
import torch
from torch import nn

from medical_gradient_shares import Gradient, shares


def test_a_gradient_along_the_singular_directions_is_all_s_sams():
    weight = torch.randn(6, 4, dtype=torch.float64)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    along = left @ torch.diag(torch.tensor([3.0, 0, 4, 0], dtype=torch.float64)) @ right
    found = shares([(along, weight)])
    assert found["S-SAM: u_i v_iᵀ of every singular value"] == pytest.approx(1)
    assert found["the best of rank 1"] == pytest.approx(16 / 25) and found["the best of rank 2"] == pytest.approx(1)

    across = torch.outer(left[:, 0], right[1])
    found = shares([(along, weight), (2 * across, weight)])
    assert found["S-SAM: u_i v_iᵀ of every singular value"] == pytest.approx(25 / 29)


def test_the_gradient_is_autograds_and_about_the_mean_what_centred_inputs_would_give():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 3), torch.randn(2, 5, 4) + 7
    gradient = Gradient(layer, layer.weight.detach())
    for batch in inputs:
        layer(batch[None].requires_grad_()).square().sum().backward()
    torch.testing.assert_close(gradient.whole.float(), layer.weight.grad, rtol=1e-4, atol=1e-4)

    rows = inputs.flatten(0, 1)
    outputs = nn.functional.linear(rows, layer.weight, layer.bias)
    (of_outputs,) = torch.autograd.grad(outputs.square().sum(), outputs)
    centred = of_outputs.mT @ (rows - rows.mean(0))
    torch.testing.assert_close(gradient.about_the_mean.float(), centred, rtol=1e-3, atol=1e-3)
