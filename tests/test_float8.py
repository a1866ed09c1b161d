"""Weights stored in float8 and cast for the product, as in diffusers' layerwise casting."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from svdtune import SVDScaleShiftConfig

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]


def stored_in(dtype):
    linear = nn.Linear(24, 16).to(torch.bfloat16).requires_grad_(False)
    linear.weight.data = linear.weight.data.to(dtype)
    linear.forward = types.MethodType(lambda self, x: F.linear(x, self.weight.to(x.dtype), self.bias), linear)
    return nn.Sequential(linear)


@pytest.mark.parametrize("choices", [{}, {"one_sided": True}, {"rank": 5}], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_it_is_tuned_through_the_values_that_it_holds(dtype, choices, train, relative_error, tmp_path):
    base = stored_in(dtype)
    model = train(get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(target_modules=["0"], **choices)))
    layer, x = model.base_model.model[0], torch.randn(6, 24).bfloat16()
    left, values, right = torch.linalg.svd(base[0].weight.double(), full_matrices=False)
    count = layer.rank["default"]
    a, b = layer.svd_scale_shift_scale["default"].double(), layer.svd_scale_shift_shift["default"].double()
    values[:count] = (a * values[:count] + b).relu()
    weight = (left * values) @ right
    expected = F.linear(x.double(), weight, base[0].bias.double())
    assert relative_error(model(x), expected) < 1e-2
    assert relative_error(base(x), expected) > 0.05
    assert layer.weight.dtype is torch.bfloat16 and relative_error(layer.weight, weight) < 1e-2

    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))
    model.merge_adapter(safe_merge=True)
    assert layer.base_layer.weight.dtype is dtype and relative_error(layer.base_layer.weight, weight) < 0.1
    model.unmerge_adapter()
    assert relative_error(model(x), expected) < 1e-2
