import pytest
import torch

torch.set_flush_denormal(True)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture
def train():
    """Gives an adapter the values it may have after training; ReLU clips about a quarter of the singular values."""

    @torch.no_grad()
    def train(model, adapter_name="default"):
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape)
            if name.endswith(f"svd_scale_shift_a.{adapter_name}.weight"):
                sign = torch.where(torch.arange(len(random)) % 4 == 1, -1.0, 1.0)
                parameter.copy_(sign * (1 + 0.3 * random) - 1)
            elif name.endswith(f"svd_scale_shift_b.{adapter_name}.weight"):
                parameter.copy_(0.1 * random)
        return model

    return train


@pytest.fixture
def paper_weight():
    """The paper's W' = U diag(relu(A * S + B)) Vᵀ in float64, one decomposition per group of the weight."""

    def paper_weight(weight, scale, shift, groups=1):
        matrices = weight.detach().double().reshape(groups, weight.shape[0] // groups, -1)
        left, singular_values, right = torch.linalg.svd(matrices, full_matrices=False)
        transformed = scale.double().view(groups, -1) * singular_values + shift.double().view(groups, -1)
        return (left @ torch.diag_embed(transformed.relu()) @ right).reshape(weight.shape)

    return paper_weight


@pytest.fixture
def relative_error():
    def relative_error(actual, expected):
        return ((actual.detach().double() - expected.double()).norm() / expected.double().norm()).item()

    return relative_error
