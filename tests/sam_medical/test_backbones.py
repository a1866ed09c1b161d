"""Equal masks from equal weights: official checkpoint, transformers, and resized positions."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamModel

from sam_medical.common.errors import UserError
from sam_medical.models.loading import load_backbone
from sam_medical.models.prompts import NoPrompts, TextPrompts
from sam_medical.models.sam import resize_positions


@torch.no_grad()
def official_masks(sam, images, prompts):
    """Returns mask logits (B, K, S, S) of the official code, one image and prompt token at a time; images in 0..1."""
    size = images.shape[-1]
    rows = []
    for image in images:
        embedding = sam.image_encoder(sam.preprocess(image * 255)[None])
        _, no_mask = sam.prompt_encoder(points=None, boxes=None, masks=None)
        for prompt in prompts:
            logits, _ = sam.mask_decoder(
                image_embeddings=embedding,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=prompt[None, None],
                dense_prompt_embeddings=no_mask,
                multimask_output=False,
            )
            rows.append(torch.nn.functional.interpolate(logits, (size, size), mode="bilinear", align_corners=False))
    return torch.cat(rows).reshape(len(images), len(prompts), size, size)


@torch.no_grad()
@pytest.mark.parametrize("nesting", [None, "model"], ids=["bare", "under model"])
def test_official_checkpoint_gives_the_official_masks(official_sam, tmp_path, nesting):
    weights = official_sam.state_dict()
    torch.save({nesting: weights} if nesting else weights, tmp_path / "sam.pth")
    images, text_embeddings = torch.rand(2, 3, 128, 128), torch.randn(3, 10)
    model = load_backbone(str(tmp_path / "sam.pth"), 128).prompt_with(TextPrompts(text_embeddings, 256))

    expected = official_masks(official_sam, images, model.prompts.text_affine(text_embeddings))
    assert expected.std() > 0.1
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_official_checkpoint_at_another_size_is_the_official_model_with_resized_positions(official_sam, tmp_path):
    torch.save(official_sam.state_dict(), tmp_path / "sam.pth")
    model = load_backbone(str(tmp_path / "sam.pth"), 64).prompt_with(NoPrompts())
    images = torch.rand(1, 3, 64, 64)

    full_size = official_sam.image_encoder.pos_embed
    try:
        # The paper averages the table; the relative positions the official package interpolates by itself.
        averaged = full_size.reshape(1, 4, 2, 4, 2, -1).mean((2, 4))
        official_sam.image_encoder.pos_embed = torch.nn.Parameter(averaged)
        expected = official_sam.image_encoder((images * 255 - official_sam.pixel_mean) / official_sam.pixel_std)
    finally:
        official_sam.image_encoder.pos_embed = full_size
    torch.testing.assert_close(model.image_encoder(model.pixels(images)), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_folder_gives_the_masks_of_transformers(tiny_sam_folder):
    sam = SamModel.from_pretrained(tiny_sam_folder).eval()
    text_embeddings = torch.randn(1, 10)
    model = load_backbone(str(tiny_sam_folder), 64).prompt_with(TextPrompts(text_embeddings, 256))
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        model.image_encoder(pixel_values), sam.get_image_embeddings(pixel_values), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(model.position_of_pixels, sam.get_image_wide_positional_embeddings())

    images = torch.rand(1, 3, 64, 64)
    expected, _ = sam.mask_decoder(
        image_embeddings=sam.get_image_embeddings(model.pixels(images)),
        image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=model.prompts.text_affine(text_embeddings)[None, None],
        dense_prompt_embeddings=sam.get_prompt_embeddings(input_masks=None)[1],
        multimask_output=False,
    )
    expected = torch.nn.functional.interpolate(expected[:, 0], (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)


def test_a_folder_in_half_precision_is_computed_in_full(tiny_sam_folder, tmp_path):
    SamModel.from_pretrained(tiny_sam_folder).half().save_pretrained(tmp_path)
    model = load_backbone(str(tmp_path), 64).prompt_with(NoPrompts())
    assert model(torch.rand(1, 3, 64, 64)).dtype is torch.float32


@pytest.mark.parametrize("image_size", [32, 96, 112])
def test_any_multiple_of_the_patch_will_do(tiny_sam_folder, image_size):
    model = load_backbone(str(tiny_sam_folder), image_size).prompt_with(TextPrompts(torch.randn(3, 10), 256))
    logits = model(torch.rand(2, 3, image_size, image_size))
    assert logits.shape == (2, 3, image_size, image_size)


def test_positions_are_averaged_to_a_smaller_grid():
    table = torch.arange(16.0).reshape(1, 4, 4, 1)
    expected = torch.tensor([[2.5, 4.5], [10.5, 12.5]]).reshape(1, 2, 2, 1)
    torch.testing.assert_close(resize_positions(table, 2), expected)


def test_wrong_backbones_are_told_apart(tmp_path, official_sam, tiny_sam_folder):
    for name, change in (
        ("lacking", lambda weights: weights.pop("mask_decoder.iou_token.weight")),
        ("reshaped", lambda weights: weights.update({"mask_decoder.iou_token.weight": torch.zeros(2, 256)})),
    ):
        shutil.copytree(tiny_sam_folder, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of a SamModel, first of them mask_decoder\.iou_token"):
        load_backbone(str(tmp_path / "lacking"), 64)
    with pytest.raises(UserError, match=r"the weights in .*reshaped are not those of its config\.json"):
        load_backbone(str(tmp_path / "reshaped"), 64)

    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    weights = official_sam.state_dict()
    del weights["mask_decoder.iou_token.weight"]
    torch.save(weights, tmp_path / "cut.pth")
    for name, message in {
        tmp_path / "vit": "holds a model of type 'vit'",
        tmp_path / "nothing": "there is no SAM model",
        tmp_path / "nothing.pth": "there is no checkpoint",
        tmp_path / "resnet.pth": "is not a segment-anything checkpoint",
        tmp_path / "text.pth": "is not a checkpoint that torch can read",
        tmp_path / "cut.pth": "is of another architecture: 1 tensors",
    }.items():
        with pytest.raises(UserError, match=message):
            load_backbone(str(name), 128)
    with pytest.raises(UserError, match="image_size 130 does not fit lite-medsam"):
        load_backbone("lite-medsam", 130)
