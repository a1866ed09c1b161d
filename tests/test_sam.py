"""The official segment_anything package: default targets, its own predictor classes, and adapter conversion."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from svdtune import SVDScaleShiftConfig, convert_sam_adapter
from svdtune.sam_names import rename_tensor

LAYERS = [f"blocks.{i}.{name}" for i in range(4) for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def sam(official_sam):
    return copy.deepcopy(official_sam)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)


def in_transformers(sam):
    """transformers' model of the same weights."""
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=128,
            mlp_dim=192,
            window_size=3,
            global_attn_indexes=[1, 3],
        ),
        prompt_encoder_config=SamPromptEncoderConfig(image_size=128, patch_size=16),
        mask_decoder_config=SamMaskDecoderConfig(layer_norm_eps=1e-5),
    )
    model = SamModel(config).eval()
    weights = {rename_tensor(name, "transformers"): tensor for name, tensor in sam.state_dict().items()}
    weights["shared_image_embedding.positional_embedding"] = weights[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    model.load_state_dict(weights)
    return model.to(next(sam.parameters()).dtype)


@torch.no_grad()
def masks_of(sam, embeddings):
    """Mask logits for one point, by the official decoder."""
    point = (torch.tensor([[[60.0, 50.0]]]), torch.ones(1, 1))
    sparse, dense = sam.prompt_encoder(points=point, boxes=None, masks=None)
    return sam.mask_decoder(
        image_embeddings=embeddings,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )[0]


# Which layers


def test_without_targets_the_encoder_blocks_of_the_official_package_are_tuned(sam):
    class Subclass(type(sam.image_encoder)):
        pass

    class Holder(nn.Module):  # as MedSAM's
        def __init__(self):
            super().__init__()
            self.image_encoder = copy.deepcopy(sam.image_encoder)

    class ImageEncoderViT(nn.Module):  # as a copy of the package within another
        __module__ = "mobile_sam.modeling.image_encoder"

        def __init__(self):
            super().__init__()
            self.blocks = copy.deepcopy(sam.image_encoder.blocks)

    subclass = copy.deepcopy(sam.image_encoder)
    subclass.__class__ = Subclass
    alone = copy.deepcopy(sam.image_encoder)
    for model, prefix in (
        (alone, ""),
        (subclass, ""),
        (ImageEncoderViT(), ""),
        (Holder(), "image_encoder."),
        (sam, "image_encoder."),
    ):
        tuned = get_peft_model(model, SVDScaleShiftConfig())
        assert sorted(tuned.base_model.targeted_module_names) == sorted(f"{prefix}{name}" for name in LAYERS)

    ImageEncoderViT.__module__ = "somebody.elses.vit"
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(ImageEncoderViT(), SVDScaleShiftConfig())


# The package's own classes around a tuned model


@torch.no_grad()
def test_the_predictor_and_the_mask_generator_serve_the_tuned_model(
    sam, image, train, paper_weight, relative_error, tmp_path, monkeypatch
):
    from segment_anything import SamAutomaticMaskGenerator, SamPredictor

    monkeypatch.setattr("torchvision.extension._has_ops", lambda: True)

    def logits(model):
        predictor = SamPredictor(model)
        predictor.set_image(image)
        return torch.from_numpy(predictor.predict(np.array([[60, 50]]), np.array([1]), return_logits=True)[0])

    def masks(model):
        everything = {"pred_iou_thresh": -1e3, "stability_score_thresh": -1.0, "points_per_side": 3}
        found = SamAutomaticMaskGenerator(model, **everything).generate(image)
        return sorted((tuple(mask["bbox"]), mask["area"]) for mask in found)

    base, reference = copy.deepcopy(sam), copy.deepcopy(sam)
    model = train(get_peft_model(sam, SVDScaleShiftConfig())).eval()
    for name in LAYERS:
        layer, tuned = reference.image_encoder.get_submodule(name), model.image_encoder.get_submodule(name)
        values = torch.linalg.svdvals(layer.weight.double()) + tuned.delta_of("default")
        layer.weight.copy_(paper_weight(layer.weight, torch.zeros(len(values)), values))
    expected = logits(reference)
    assert relative_error(logits(base), expected) > 0.1
    assert relative_error(logits(model), expected) < 1e-4
    assert masks(model) == masks(reference) != masks(base)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path), strict=True)
    assert torch.equal(logits(loaded), logits(model))
    merged = model.merge_and_unload()
    assert type(merged) is type(reference)
    assert relative_error(logits(merged), expected) < 1e-4


# To transformers and back


@torch.no_grad()
def test_an_adapter_is_carried_over_to_transformers_and_back(sam, dtype, train, relative_error, tmp_path):
    sam.to(dtype)
    base, twin = copy.deepcopy(sam), in_transformers(sam)
    ranks = {r"blocks\.[12]\..*qkv": 8}
    choices = {"rank_pattern": ranks, "modules_to_save": ["neck", "iou_prediction_head"]}
    choices["bias"] = "svd_scale_shift_only"
    model = train(get_peft_model(sam, SVDScaleShiftConfig(**choices))).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "official")

    convert_sam_adapter(tmp_path / "official", tmp_path / "transformers", to="transformers")
    tuned = PeftModel.from_pretrained(twin, str(tmp_path / "transformers"), strict=True).eval()
    pixels = torch.randn(2, 3, 128, 128).to(dtype)
    expected, tolerance = model.image_encoder(pixels), {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(base.image_encoder(pixels), expected) > 0.1
    assert relative_error(tuned.get_image_embeddings(pixels), expected) < tolerance

    if dtype is torch.float32:  # the official package encodes points in nothing else
        points = {"input_points": torch.tensor([[[[60.0, 50.0]]]]), "input_labels": torch.ones(1, 1, 1).int()}
        masks = tuned(image_embeddings=expected[:1], multimask_output=True, **points).pred_masks[:, 0]
        assert relative_error(masks, masks_of(model, expected[:1])) < 5 * tolerance

    convert_sam_adapter(tmp_path / "transformers", tmp_path / "back", to="segment_anything")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("official", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("official", "back")
    )
    assert before["fingerprints"] == after["fingerprints"]
    again = PeftModel.from_pretrained(base, str(tmp_path / "back"), strict=True).eval()
    assert torch.equal(again.image_encoder(pixels), expected)


@torch.no_grad()
def test_an_adapter_of_the_encoder_alone_is_carried_over(sam, train, relative_error, tmp_path):
    twin = in_transformers(sam).vision_encoder
    model = train(get_peft_model(sam.image_encoder, SVDScaleShiftConfig()))
    model.save_pretrained(tmp_path / "official")
    convert_sam_adapter(tmp_path / "official", tmp_path / "transformers", to="transformers")
    tuned = PeftModel.from_pretrained(twin, str(tmp_path / "transformers"), strict=True)
    pixels = torch.randn(1, 3, 128, 128)
    assert relative_error(tuned(pixels).last_hidden_state, model(pixels)) < 1e-5


@pytest.mark.parametrize(
    "choices, message",
    [
        (
            {"modules_to_save": ["output_upscaling"]},
            "`mask_decoder.output_upscaling` is not a module that SAM has",
        ),
        ({"target_parameters": ["mask_decoder.iou_token.weight"]}, "it has `target_parameters`"),
        ({"target_modules": ["adapter"]}, "`image_encoder.blocks.0.adapter` is not a module that SAM has"),
    ],
)
def test_what_sam_does_not_have_in_both_packages_is_refused(sam, choices, message, tmp_path):
    sam.image_encoder.blocks[0].adapter = nn.Linear(48, 8)
    get_peft_model(sam, SVDScaleShiftConfig(**choices)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        convert_sam_adapter(tmp_path / "adapter", tmp_path / "converted", to="transformers")
    assert not (tmp_path / "converted").exists()


def test_a_conversion_that_cannot_be_meant_is_refused(sam, tmp_path):
    get_peft_model(sam, SVDScaleShiftConfig()).save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "adapter"
    for source, output, to, message in (
        (folder, folder, "transformers", "is the adapter's own folder"),
        (folder, tmp_path / "other", "diffusers", "`to` is 'diffusers'"),
        (folder, tmp_path / "other", "segment_anything", "`image_encoder.blocks.0.attn.proj` is not a module"),
        (tmp_path / "nothing", tmp_path / "other", "transformers", "it has no adapter_config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_sam_adapter(source, output, to)
