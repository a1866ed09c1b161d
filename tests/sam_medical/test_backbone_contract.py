"""The contract that every backbone in `BACKBONES` must pass."""

import re

import pytest
import torch
from torch import nn

from sam_medical.models.backbone import NO_MASK_LOGIT, Backbone, checkpoint_blocks
from sam_medical.models.loading import load_backbone
from sam_medical.models.prompts import BOX, IMAGE, LABELS, NOTHING, POINT

SIZES = (64, 96)
K = 3


@pytest.fixture(params=["lite-medsam", "sam"])
def load(request, tiny_sam_folder):
    """Loads the backbone at an image size."""
    name = {"lite-medsam": "lite-medsam", "sam": str(tiny_sam_folder)}[request.param]
    return lambda image_size=SIZES[0]: load_backbone(name, image_size)


@pytest.fixture
def backbone(load):
    return load()


def batch(size=SIZES[0]):
    images, masks = torch.rand(2, 3, size, size), torch.zeros(2, K, size, size)
    masks[:, 0, 5:40, 8:30] = 1
    masks[1, 1, 40:60, 40:64] = 1
    return images, masks


def prompted(backbone, kind, text=None):
    prompter = kind.make(backbone, K, text)
    return backbone.prompt_with(prompter, K if kind is NOTHING else None).eval()


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [LABELS, NOTHING, IMAGE, POINT, BOX], ids=lambda kind: kind.name)
def test_every_kind_of_prompt_gives_one_mask_per_label(load, kind, size):
    images, masks = batch(size)
    logits = prompted(load(size), kind, torch.randn(K, 10))(images, masks)
    assert logits.shape == (2, K, size, size) and logits.isfinite().all()
    absent = ~masks.flatten(2).any(2)
    assert (logits[absent] == NO_MASK_LOGIT).all() == kind.from_expert


@torch.no_grad()
def test_embeddings_and_tokens_have_the_shapes_that_it_says(backbone):
    images, _ = batch()
    embeddings = backbone.encode(images)
    assert embeddings.shape[-2:] == backbone.grid and len(embeddings) == 2
    points, boxes = torch.full((2, K, 2), 20.0), torch.tensor([10.0, 10, 40, 50]).expand(2, K, 4)
    for tokens in (backbone.embed_points(points), backbone.embed_boxes(boxes)):
        assert tokens.shape[:2] == (2, K) and tokens.shape[3] == backbone.prompt_width
    assert not torch.equal(backbone.embed_points(points), backbone.embed_points(points + 5))


def test_all_is_frozen_until_a_method_says_otherwise(backbone):
    assert not any(parameter.requires_grad for parameter in prompted(backbone, LABELS).parameters())


@pytest.mark.parametrize(
    "part", ["norms", "positions", "prompts", "image encoder", "prompt encoder", "default prompt", "mask decoder"]
)
def test_a_part_is_modules_whose_parameters_all_get_a_gradient(backbone, part):
    """With the prompts that methods use beside that part; otherwise several processes would wait for ever."""
    model = prompted(backbone, POINT if part == "prompt encoder" else LABELS)
    names = model.names_of([part])
    assert names
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    images, masks = batch()
    model.train()(images, masks).square().mean().backward()
    gradients = {f"{name}.{n}": p.grad for name in names for n, p in model.get_submodule(name).named_parameters()}
    assert gradients and not [name for name, grad in gradients.items() if grad is None]


def test_an_unknown_part_is_an_error(backbone):
    with pytest.raises(ValueError, match="no part 'neck'"):
        prompted(backbone, LABELS).names_of(["neck"])


def test_target_modules_are_layers_of_the_encoder(backbone):
    model = prompted(backbone, LABELS)
    layers = {n: m for n, m in model.named_modules() if re.fullmatch(backbone.target_modules, n)}
    assert layers and all(name.startswith("image_encoder.") for name in layers)
    assert all(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in layers.values())
    encoder_linears = [m for m in model.image_encoder.modules() if isinstance(m, nn.Linear)]
    assert {id(m) for m in encoder_linears} <= {id(m) for m in layers.values()}


def test_patterns_find_layers_and_mlps(backbone):
    names = [name for name, _ in backbone.named_modules()]
    for pattern in backbone.patterns:
        found = [backbone.get_submodule(name) for name in names if re.fullmatch(pattern, name)]
        assert found
        assert all(any(isinstance(layer, nn.Linear) for layer in module.modules()) for module in found)


def test_rows_of_queries_and_values_are_apart_and_as_many(backbone):
    for name, (queries, values) in backbone.query_and_value_rows().items():
        rows = backbone.get_submodule(name).out_features
        assert not set(queries.tolist()) & set(values.tolist())
        assert len(queries) == len(values) and max(*queries, *values) < rows


def test_the_digest_knows_the_weights_and_not_the_image_size(load):
    one, other = load(SIZES[0]), load(SIZES[1])
    assert one.digest() == other.digest()
    next(one.image_encoder.parameters()).data += 1
    assert one.digest() != other.digest()


def test_blocks_recompute_with_the_same_gradients(load):
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = prompted(load(), LABELS)
        if checkpointed:
            assert list(model.blocks())
            checkpoint_blocks(model)
        model.image_encoder.requires_grad_(True)
        torch.manual_seed(1)
        model.train()(*batch()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-6, rtol=1e-3)


def test_positions_are_known_for_the_optimizer(backbone):
    model = prompted(backbone, LABELS)
    positions = [
        name
        for module in model.image_encoder.modules()
        for name, _ in module.named_parameters(recurse=False)
        if model.is_position(module, name)
    ]
    assert positions and isinstance(model, Backbone)
