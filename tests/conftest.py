import sys
from functools import partial
from pathlib import Path

import pytest
import torch

torch.set_flush_denormal(True)
torch.set_num_threads(1)

# Official packages that the tests compare with, apart from the environment: `make` installs them.
REFERENCES = Path(__file__).parents[1] / ".venv" / "references"


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


@pytest.fixture(scope="session")
def torchvision_operators():
    """Lets torchvision be imported without its compiled operators, of which there is no build for this torch."""
    sys.path.append(str(REFERENCES))
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", non_maximum_suppression, "CPU")
    yield
    sys.path.remove(str(REFERENCES))


def non_maximum_suppression(boxes, scores, threshold):
    """The boxes (N, 4) that overlap none of higher score by more than a share of both; their indices by score."""
    size = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    least, most = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    common = (most - least).clamp(min=0).prod(-1)
    overlaps = common > threshold * (size[:, None] + size[None] - common)
    kept = []
    for index in scores.argsort(descending=True).tolist():
        if not overlaps[index, kept].any():
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64)


@pytest.fixture(scope="module")
def official_sam(torchvision_operators):
    """The official package's own modules, small, with random weights in every tensor (norms and tables too)."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=128,
            depth=4,
            embed_dim=48,
            num_heads=3,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1, 3),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=256, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=256, transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        ),
    )
    torch.manual_seed(0)
    for tensor in sam.state_dict().values():
        tensor.copy_(tensor + 0.05 * torch.randn_like(tensor))
    return sam.eval()
