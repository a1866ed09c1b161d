"""Learning rates and weight decay of an adapter's parameters."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

import svdtune
from svdtune import SVDScaleShiftConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.linear = nn.Embedding(9, 12), nn.Linear(12, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, rows):
        return self.head(self.norm(self.linear(self.tokens(rows))))


@pytest.fixture
def model(train):
    choices = {"modules_to_save": ["norm", "head"], "trainable_token_indices": {"tokens": [1, 2]}}
    return train(get_peft_model(Net(), SVDScaleShiftConfig(target_modules=["linear"], **choices)))


def test_a_and_b_have_a_rate_of_their_own_and_what_has_a_zero_decays(model):
    head = model.base_model.model.head.modules_to_save["default"]
    groups = svdtune.parameter_groups(model, lr=0.01, weight_decay=0.1, value_rate=4)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {
        names[id(parameter)].replace("base_model.model.", ""): (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found == {
        "linear.svd_scale_shift_a.default.weight": (0.04, 0.1),
        "linear.svd_scale_shift_b.default.weight": (0.04, 0.1),
        "head.modules_to_save.default.weight": (0.01, 0.1),
        "head.modules_to_save.default.bias": (0.01, 0),
        "norm.modules_to_save.default.weight": (0.01, 0),
        "norm.modules_to_save.default.bias": (0.01, 0),
        "tokens.token_adapter.trainable_tokens_delta.default": (0.01, 0),
    }
    groups = svdtune.parameter_groups(model, lr=0.01, weight_decay=0.1, undecayed=[head.weight])
    assert sum(len(group["params"]) for group in groups if group["weight_decay"]) == 2


def test_weight_decay_pulls_towards_the_pretrained_weight(model):
    layer = model.base_model.model.linear
    # What relu has clipped comes back only once (1 + a) S + B is above zero.
    for _ in range(2):
        away = layer.get_delta_weight("default").norm().item()
        optimizer = torch.optim.AdamW(svdtune.parameter_groups(model, lr=0.1, weight_decay=1.0))
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer.step()
        assert layer.get_delta_weight("default").norm() < 0.5 * away


def test_an_adapter_in_bfloat16_moves_as_one_in_float32():
    base = Net()
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        config = SVDScaleShiftConfig(target_modules=["linear"])
        tuned = get_peft_model(copy.deepcopy(base).to(dtype), config, autocast_adapter_dtype=dtype is torch.float32)
        optimizer = torch.optim.AdamW(svdtune.parameter_groups(tuned, lr=1e-4))
        a = tuned.base_model.model.linear.svd_scale_shift_a["default"].weight
        assert a.dtype is dtype
        for _ in range(20):
            nn.functional.cross_entropy(tuned(torch.arange(6)).float(), torch.arange(6) % 3).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[dtype] = a.detach().double()
    assert moved[torch.float32].abs().max() > 1e-3
    torch.testing.assert_close(moved[torch.bfloat16], moved[torch.float32], rtol=0.2, atol=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"lr": 1e-3, "weight_decay": -1}, {"lr": 1e-3, "value_rate": 0}], ids=str
)
def test_rates_that_cannot_be_are_refused_by_name(wrong, model):
    name = list(wrong)[-1]
    with pytest.raises(ValueError, match=f"`{name}` is {wrong[name]}"):
        svdtune.parameter_groups(model, **wrong)


def test_a_model_in_which_nothing_learns_is_refused(model):
    with pytest.raises(ValueError, match="Nothing learns"):
        svdtune.parameter_groups(model.requires_grad_(False), lr=1e-3)
