"""Both ways to merge keep the original, and give it back; a stand-in quantises, so that no package is needed."""

import copy

import pytest
import torch
from torch import nn

from svdtune import SVDScaleShiftConfig
from svdtune.kinds import Linear

STEP = 0.005  # between two codes


class Quantized(nn.Module):
    """A linear layer that holds its weight as codes."""

    def __init__(self, linear):
        super().__init__()
        self.codes = nn.Parameter((linear.weight.detach() / STEP).round(), requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self):
        return nn.Parameter(STEP * self.codes, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Backend:
    """PEFT's interface to quantised layers. Like HQQ's, it makes a new layer, without the bias."""

    supports_merge, backend_name = True, "stand-in"

    def get_base_weight(self, layer):
        return layer.weight.detach()

    def set_base_weight(self, layer, weight):
        linear = nn.Linear(*weight.T.shape, bias=False)
        linear.weight.data = weight
        layer.base_layer = Quantized(linear)


def plain():
    return Linear(nn.Linear(24, 16).requires_grad_(False), "default", SVDScaleShiftConfig())


def quantized():
    layer = Linear(
        Quantized(nn.Linear(24, 16).requires_grad_(False)),
        "default",
        SVDScaleShiftConfig(),
        quantization_backend=Backend(),
    )
    layer.in_features, layer.out_features = 24, 16
    return layer


each_way = pytest.mark.parametrize("make_layer", [plain, quantized])


@each_way
def test_a_merged_layer_computes_what_the_tuned_one_did(make_layer, train, relative_error):
    layer, x = train(make_layer()), torch.randn(3, 24)
    y, base = layer(x), layer.base_layer(x)
    layer.merge()
    assert torch.equal(layer(x), layer.base_layer(x))
    assert relative_error(layer(x), y) < (0.1 if make_layer is quantized else 1e-6) < relative_error(base, y)
    assert layer.base_layer.bias is not None


@each_way
def test_unmerging_gives_back_the_original_itself(make_layer, train):
    layer, x = train(make_layer()), torch.randn(3, 24)
    base_layer, parameter = layer.base_layer, dict(layer.base_layer.named_parameters())
    state, y = copy.deepcopy(layer.state_dict()), layer(x)
    layer.merge()
    assert layer.state_dict().keys() == state.keys()
    layer.unmerge()
    assert layer.base_layer is base_layer
    assert all(getattr(base_layer, name) is original for name, original in parameter.items())
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(layer(x), y)


@each_way
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_a_second_merge_starts_from_the_original(make_layer, train):
    layer = train(make_layer())
    layer.update_layer("other", SVDScaleShiftConfig())
    train(layer, "other")
    layer.merge(adapter_names=["default", "other"])
    together = layer.get_base_weight().clone()
    layer.unmerge()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["other"])
    assert torch.equal(layer.get_base_weight(), together)


@each_way
def test_the_original_follows_the_layer_to_another_dtype_and_mode(make_layer):
    layer = make_layer()
    layer.merge()
    layer.double().eval()
    layer.unmerge()
    assert layer.base_layer.weight.dtype is torch.float64
    if make_layer is quantized:
        assert not layer.base_layer.training
