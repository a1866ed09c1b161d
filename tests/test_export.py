"""Exported and compiled graphs work for any number of rows."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from svdtune import SVDScaleShiftConfig

# Shapes on both sides of where the weight is rebuilt, and of where the values go to the vectors.
SHAPES = [(2, 3, 16), (3, 50, 16), (64, 64, 16)]


@pytest.fixture(params=[{}, {"rank": 4}, {"one_sided": True}], ids=["full rank", "rank", "one-sided"])
def model(request, dtype, train):
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)).to(dtype)
    return train(get_peft_model(net, SVDScaleShiftConfig(target_modules=["0", "2", "4"], **request.param))).eval()


@pytest.fixture
def tolerance(dtype):
    return {"rtol": 0, "atol": {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "with gradients"])
def test_an_exported_graph_serves_every_number_of_rows(model, dtype, tolerance, grad):
    rows = {0: Dim("batch", min=2, max=4096), 1: Dim("tokens", min=2, max=512)}
    inner = model.base_model.model
    with torch.set_grad_enabled(grad):
        exported = export(inner, (torch.randn(4, 6, 16).to(dtype),), dynamic_shapes=(rows,)).module()
        for shape in SHAPES:
            x = torch.randn(shape).to(dtype)
            torch.testing.assert_close(exported(x), inner(x), **tolerance)


def test_a_model_compiled_for_any_number_of_rows_is_compiled_once(model, dtype, tolerance):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        torch.testing.assert_close(compiled(x), model(x), **tolerance)
    assert counter.frame_count == 1
