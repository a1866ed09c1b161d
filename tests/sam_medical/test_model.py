"""Properties of the prompted model."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import SamModel

from sam_medical.data.base import Sample
from sam_medical.data.loading import evaluation_loader
from sam_medical.models.backbone import NO_MASK_LOGIT, checkpoint_blocks
from sam_medical.models.loading import load_backbone
from sam_medical.models.prompts import (
    BoxPrompts,
    ImagePrompts,
    PointPrompts,
    Prompts,
    TextAffineLayer,
    TextPrompts,
    bounding_box,
    innermost_point,
    random_point,
)


@pytest.fixture
def backbone(tiny_sam_folder):
    return load_backbone(str(tiny_sam_folder), 64)


@torch.no_grad()
def test_labels_do_not_see_each_other(backbone):
    images, text_embeddings = torch.rand(2, 3, 64, 64), torch.randn(3, 10)
    model = backbone.prompt_with(TextPrompts(text_embeddings, 256)).eval()
    together = model(images)
    for k in range(3):
        model.prompts.text_embeddings = text_embeddings[k : k + 1]
        torch.testing.assert_close(model(images)[:, 0], together[:, k], atol=1e-5, rtol=1e-4)


def test_an_image_is_encoded_once_for_all_its_labels(backbone):
    model = backbone.prompt_with(TextPrompts(torch.randn(5, 10), 256))
    encoded = []
    model.image_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output.shape))
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5, 64, 64)
    assert encoded == [(2, 256, 4, 4)]


def test_text_affine_layer_normalises_each_token_after_the_relu():
    layer = TextAffineLayer(text_width=10, prompt_width=16)
    text_embeddings = torch.randn(3, 10)
    hidden = (text_embeddings @ layer.linear.weight.T + layer.linear.bias).clamp(min=0)
    expected = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(text_embeddings), expected)


@torch.no_grad()
@pytest.mark.parametrize("in_box", [False, True], ids=["points", "points in a box"])
@pytest.mark.parametrize("image_size", [64, 32])
def test_an_experts_point_is_that_of_transformers(tiny_sam_folder, image_size, in_box):
    """Given in the middle of the same pixel; a label that is absent has no prompt and no mask."""
    backbone = load_backbone(str(tiny_sam_folder), image_size)
    images, masks = torch.rand(1, 3, image_size, image_size), torch.zeros(1, 2, image_size, image_size)
    masks[0, 0, 10:31, 8:29] = 1
    backbone.whole_image_box = in_box
    model = backbone.prompt_with(PointPrompts()).eval()
    logits = model(images, masks)

    middle = (torch.tensor([18.0, 20.0]) + 0.5) * 64 / image_size - 0.5  # to which transformers adds its half
    box = torch.tensor([[[0.0, 0, 64, 64], [0, 0, 64, 64]]]) if in_box else None
    points = torch.stack([middle, middle])[None, :, None]
    tokens, _ = backbone.prompt_encoder(points, torch.ones(1, 2, 1, dtype=torch.int), box, None)
    assert tokens.shape[2] == (3 if in_box else 2)
    expected = model.decode(model.image_encoder(backbone.pixels(images)), Prompts(tokens[:, :1]))
    expected = torch.nn.functional.interpolate(expected, (image_size,) * 2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits[:, :1], expected, atol=1e-4, rtol=1e-4)
    assert (logits[:, 1] == NO_MASK_LOGIT).all()


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PointPrompts(), BoxPrompts()], ids=["points", "boxes"])
def test_an_experts_masks_are_those_of_transformers(tiny_sam_folder, backbone, prompts):
    images, masks = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    masks[0, 0, 10:31, 20:61] = 1
    logits = backbone.prompt_with(prompts).eval()(images, masks)

    sam = SamModel.from_pretrained(tiny_sam_folder).eval()
    hint = {"input_points": torch.tensor([[[[30.0, 20.0]]]])}
    if isinstance(prompts, BoxPrompts):
        hint = {"input_boxes": torch.tensor([[[20.0, 10.0, 61.0, 31.0]]])}
    expected = sam(pixel_values=backbone.pixels(images), **hint, multimask_output=False).pred_masks[:, 0]
    expected = torch.nn.functional.interpolate(expected, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_what_is_too_small_for_the_model_is_still_pointed_at():
    mask = np.zeros((1, 512, 512), dtype=bool)
    mask[0, 100:103, 200:203] = True
    (batch,) = evaluation_loader([Sample("image", np.zeros((512, 512, 3), dtype=np.float32), mask)], 112, 1)
    y, x = batch["masks"][0, 0].nonzero().float().mean(0).tolist()
    assert (y, x) == pytest.approx((101 / 512 * 112, 201 / 512 * 112), abs=1)


def test_points_and_boxes_lie_where_the_mask_is():
    picture = Image.new("L", (40, 30))
    ImageDraw.Draw(picture).ellipse((4, 6, 14, 16), fill=1)
    ImageDraw.Draw(picture).rectangle((30, 20, 31, 21), fill=1)
    mask = torch.from_numpy(np.array(picture))
    assert innermost_point(mask).tolist() == [9, 11]
    assert bounding_box(mask).tolist() == [4, 6, 32, 22]
    torch.manual_seed(0)
    drawn = {tuple(random_point(mask).int().tolist()) for _ in range(60)}
    assert len(drawn) > 20 and all(mask[y, x] for x, y in drawn)


def test_a_prompt_from_the_image_goes_to_its_own_label_alone(backbone):
    torch.manual_seed(0)
    model = backbone.prompt_with(ImagePrompts(labels=3, grid=(4, 4), prompt_width=256)).eval()
    images = torch.rand(2, 3, 64, 64)
    before = model(images)
    with torch.no_grad():
        model.prompts.project.weight[256:512] += 1
    changed = (model(images) - before).abs().amax((0, 2, 3)) > 1e-3
    assert before.shape == (2, 3, 64, 64) and changed.tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["lite-medsam", "vit"])
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(name, tiny_sam_folder):
    gradients, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        backbone = load_backbone("lite-medsam" if name == "lite-medsam" else str(tiny_sam_folder), 64)
        model = backbone.prompt_with(TextPrompts(torch.randn(2, 10), 256)).train()
        model.image_encoder.requires_grad_(True)
        if checkpointed:
            checkpoint_blocks(model)
        tensors = {}

        def keep(tensor, tensors=tensors):
            tensors[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            embeddings = model.image_encoder(torch.linspace(0, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64))
        own = {parameter.data_ptr() for parameter in model.parameters()}
        kept.append(sum(tensor.nbytes for pointer, tensor in tensors.items() if pointer not in own))
        embeddings.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, atol=1e-6, rtol=1e-4)
    assert kept[1] < 0.8 * kept[0]
