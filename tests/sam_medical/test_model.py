"""What the text-prompted model promises, and what of it is trained."""

import pytest
import torch
from peft import get_peft_model
from transformers import SamConfig, SamModel

from ssam.backbones import backbone_from_sam, load_backbone
from ssam.methods import parameter_groups, ssam_config
from ssam.model import TextAffineLayer, TextPromptedSam


@pytest.fixture
def backbone(tiny_sam_folder):
    return load_backbone(str(tiny_sam_folder), 64)


@torch.no_grad()
def test_labels_do_not_see_each_other(backbone):
    model = TextPromptedSam(backbone, text_width=10).eval()
    images, text_embeddings = torch.rand(2, 3, 64, 64), torch.randn(3, 10)
    together = model(images, text_embeddings)
    for k in range(3):
        torch.testing.assert_close(
            model(images, text_embeddings[k : k + 1])[:, 0], together[:, k], atol=1e-5, rtol=1e-4
        )


def test_an_image_is_encoded_once_for_all_its_labels(backbone):
    model = TextPromptedSam(backbone, text_width=10)
    encoded = []
    model.image_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output.shape))
    assert model(torch.rand(2, 3, 64, 64), torch.randn(5, 10)).shape == (2, 5, 64, 64)
    assert encoded == [(2, 256, 4, 4)]


def test_text_affine_layer_normalises_each_token_after_the_relu():
    layer = TextAffineLayer(text_width=10, prompt_width=16)
    text_embeddings = torch.randn(3, 10)
    hidden = (text_embeddings @ layer.linear.weight.T + layer.linear.bias).clamp(min=0)
    expected = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(text_embeddings), expected)


def test_parameter_count_of_vit_b_at_256_pixels():
    """As the paper's parts add up with the norms of the neck, and the decoder frozen."""
    with torch.device("meta"):
        sam = SamModel(SamConfig())
    sam = sam.to_empty(device="cpu")
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = TextPromptedSam(backbone_from_sam(sam, "vit-b", 256), text_width=512)
    peft_model = get_peft_model(model, ssam_config(model, backbone_from_sam(sam, "vit-b", 256).target_modules))

    counts = {"scale and shift": 0, "position": 0, "text affine": 0, "neck norms": 0, "encoder norms": 0}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            part = next(
                part
                for part, mark in (
                    ("scale and shift", "svd_scale_shift_"),
                    ("position", "image_encoder.position."),
                    ("text affine", "text_affine."),
                    ("neck norms", "image_encoder.neck.layer_norm"),
                    ("encoder norms", "layer_norm"),
                )
                if mark in name
            )
            counts[part] += parameter.numel()
    assert counts == {
        "scale and shift": 74_752,
        "position": 196_608,
        "text affine": 131_840,
        "neck norms": 1_024,
        "encoder norms": 36_864,
    }
    assert sum(counts.values()) == 441_088


@pytest.mark.parametrize("name", ["lite-medsam", "vit"])
def test_only_the_encoder_and_the_text_affine_layer_learn(name, tiny_sam_folder):
    backbone = load_backbone("lite-medsam" if name == "lite-medsam" else str(tiny_sam_folder), 64)
    model = TextPromptedSam(backbone, text_width=10)
    peft_model = get_peft_model(model, ssam_config(model, backbone.target_modules))
    peft_model(torch.rand(2, 3, 64, 64), torch.randn(3, 10)).square().mean().backward()

    learning = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, parameter in peft_model.named_parameters() if parameter.grad is not None}
    assert not any("mask_decoder" in name or "prompt_encoder" in name for name in learning)
    untrained = [
        name
        for name, module in model.image_encoder.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm))
        and "base_layer" not in name
        and "original_module" not in name
        and not any(p.requires_grad for p in module.parameters())
    ]
    assert untrained == []


def test_decay_touches_the_text_affine_matrix_alone(backbone):
    model = TextPromptedSam(backbone, text_width=10)
    peft_model = get_peft_model(model, ssam_config(model, backbone.target_modules))
    groups = parameter_groups(peft_model, weight_decay=0.1)
    decaying = [parameter.shape for group in groups if group["weight_decay"] for parameter in group["params"]]
    assert decaying == [(256, 10)]
    grouped = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert grouped == sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
