"""The effect of each config field on the formula, on the trained parameters and on the saved files."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    SamConfig,
    SamModel,
    SiglipConfig,
    SiglipModel,
)

from svdtune import SVDScaleShiftConfig
from svdtune.kinds import LAYER_KINDS


def net():
    return nn.Sequential(nn.Embedding(30, 24), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16)).eval()


def tuned(base, **choices):
    choices = {"target_modules": ["1", "3"], "init_weights": False, **choices}
    return get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(**choices))


def adapter_sizes(model):
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


# The family of methods


@pytest.mark.parametrize(
    "choices, formula",
    [
        ({}, lambda s, a, b: (a * s + b).relu()),
        ({"nonlinearity": "none"}, lambda s, a, b: a * s + b),
        ({"shift": False, "nonlinearity": "none"}, lambda s, a, b: a * s),
        ({"scale": False}, lambda s, a, b: (s + b).relu()),
    ],
    ids=["S-SAM", "without ReLU", "SVF", "SVDiff"],
)
def test_each_method_of_the_family_computes_its_formula(choices, formula, train, relative_error):
    linear = nn.Linear(24, 40)
    layer = train(tuned(nn.Sequential(linear), target_modules=["0"], **choices)).base_model.model[0]
    left, values, right = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
    scale = layer.svd_scale_shift_scale.get("default")
    shift = layer.svd_scale_shift_shift.get("default")
    assert (scale is not None, shift is not None) == (choices.get("scale", True), choices.get("shift", True))
    transformed = formula(values, scale, shift)
    x = torch.randn(7, 24)
    expected = x.double() @ (left * transformed @ right).T + linear.bias.double()
    assert relative_error(layer(x), expected) < 1e-6
    assert relative_error(linear(x), expected) > 0.05


@pytest.mark.parametrize("choices", [{"scale": False}, {"shift": False, "nonlinearity": "none"}, {"rank": 3}], ids=str)
def test_each_method_of_the_family_saves_and_loads(choices, train, tmp_path):
    base, tokens = net(), torch.randint(0, 30, (4, 5))
    model = train(tuned(base, **choices))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(tokens), model(tokens))


# How many singular values


@pytest.mark.parametrize(
    "rank, expected",
    [(None, (24, 16)), (5, (5, 5)), (20, (20, 16)), (0.25, (6, 4)), (0.01, (1, 1)), (1.0, (24, 16)), (1, (1, 1))],
)
def test_rank_is_a_number_a_fraction_or_all(rank, expected):
    sizes = adapter_sizes(tuned(net(), rank=rank))
    assert (sizes["1.svd_scale_shift_a"], sizes["3.svd_scale_shift_b"]) == expected


def test_rank_pattern_chooses_the_rank_of_some_layers():
    sizes = adapter_sizes(tuned(net(), rank=4, rank_pattern={r"[13]": 0.5, "1": 7}))
    assert (sizes["1.svd_scale_shift_a"], sizes["3.svd_scale_shift_a"]) == (12, 8)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_only_the_leading_singular_values_change(kind, dtype, train, relative_error):
    made = {nn.Embedding: (30, 24), nn.Linear: (24, 40)}.get(kind, (24, 40) if "D" in kind.__name__ else (24, 40, 3))
    base = kind(*made).to(dtype)
    layer = train(tuned(nn.Sequential(base), target_modules=["0"], rank=5)).base_model.model[0]
    left, values, right = torch.linalg.svd(base.weight.detach().double().flatten(1), full_matrices=False)
    scale, shift = layer.svd_scale_shift_scale["default"], layer.svd_scale_shift_shift["default"]
    values[:5] = (scale.double() * values[:5] + shift.double()).relu()
    expected = (left * values @ right).view(base.weight.shape)
    changed = base.weight + layer.get_delta_weight("default")
    assert relative_error(changed, expected) < {torch.float32: 1e-5, torch.bfloat16: 3e-3}[dtype]
    layer.merge()
    assert relative_error(layer.weight, expected) < {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]


def test_an_untrained_adapter_of_lower_rank_is_the_identity_to_the_last_bit(dtype):
    base, tokens = net().to(dtype), torch.randint(0, 30, (4, 5))
    assert torch.equal(tuned(base, rank=3, init_weights=True)(tokens), base(tokens))


def test_adapters_of_different_ranks_share_one_layer(train):
    base, tokens = net(), torch.randint(0, 30, (4, 5))
    model = train(tuned(base, rank=3))
    low = model(tokens)
    alone = {}
    for name, rank in {"higher": 9, "all": None}.items():
        choices = SVDScaleShiftConfig(target_modules=["1", "3"], rank=rank)
        model.add_adapter(name, choices)
        train(model, name).set_adapter(name)
        alone[name] = model(tokens)
    for name, output in {"default": low, **alone}.items():
        model.set_adapter(name)
        torch.testing.assert_close(model(tokens), output, rtol=0, atol=1e-5)
    model.merge_adapter(["default", "higher"])
    model.unmerge_adapter()
    assert torch.equal(model.unload()(tokens), base(tokens))


# What learns beside A and B


@pytest.mark.parametrize(
    "bias, learned", [("none", set()), ("all", {"1", "3", "norm"}), ("svd_scale_shift_only", {"1", "3"})]
)
def test_biases_learn_are_saved_and_loaded_as_asked(bias, learned, tmp_path):
    base = net()
    base.add_module("norm", nn.LayerNorm(16))
    model = tuned(base, bias=bias)
    biases = {name for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad}
    assert {name.split(".")[2] for name in biases} == learned
    for name in biases:
        nn.init.constant_(model.get_parameter(name), 3.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    tokens = torch.randint(0, 30, (4, 5))
    assert torch.equal(loaded(tokens), model(tokens))


def test_trainable_tokens_learn_beside_the_tuned_layers(train, tmp_path):
    base, tokens = net(), torch.arange(30)[None]
    model = train(tuned(base, trainable_token_indices={"0": [3, 7]}))
    before = model(tokens).detach()
    delta = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    assert delta.requires_grad and delta.shape == (2, 24)
    nn.init.normal_(delta)
    changed = (model(tokens) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [3, 7]
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(tokens), model(tokens))


# Which layers, when none is named


def tiny(model_type):
    """A small random model of a type that transformers knows."""
    if model_type == "sam":
        vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32}
        vision |= {"image_size": 32, "output_channels": 8, "global_attn_indexes": [1], "window_size": 2}
        return SamModel(SamConfig(vision_config=vision))
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**text, "image_size": 32, "patch_size": 16}
    if model_type == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    if model_type == "siglip":
        return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    if model_type == "sam2":
        small = {
            "hidden_size": 8,
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 2, 2],
        }
        backbone = {
            "model_type": "sam2_hiera_det_model",
            "blocks_per_stage": [1, 1, 1, 1],
            "global_attention_blocks": [2],
        }
        vision = {"backbone_config": {**small, **backbone}, "backbone_channel_list": [64, 32, 16, 8]}
        return AutoModel.from_config(AutoConfig.for_model("sam2", vision_config=vision))
    if model_type == "sam3_vision_model":
        backbone = {"model_type": "sam3_vit_model", **text, "image_size": 56, "patch_size": 14, "window_size": 2}
        return AutoModel.from_config(AutoConfig.for_model(model_type, backbone_config=backbone))
    return AutoModel.from_config(AutoConfig.for_model(model_type, **vision))


@pytest.mark.parametrize(
    "model_type, layers",
    [
        ("sam", 2 * 4),
        ("sam2", 4 * 4 + 3),  # three blocks change the width by one more projection
        ("sam3_vision_model", 2 * 6),
        ("vit", 2 * 6),
        ("dinov2", 2 * 6),
        ("dinov3_vit", 2 * 6),
        ("clip", 2 * 2 * 6),
        ("clip_vision_model", 2 * 6),
        ("siglip", 2 * 2 * 6),
    ],
)
def test_without_targets_the_linear_layers_of_every_encoder_block_are_tuned(model_type, layers):
    model = get_peft_model(tiny(model_type), SVDScaleShiftConfig())
    names = model.base_model.targeted_module_names
    assert len(names) == layers
    assert not any("mask_decoder" in name or "prompt_encoder" in name or "head" in name for name in names)


def test_a_config_without_a_model_type_is_no_hindrance():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.config = {"sample_size": 8}  # as diffusers' models have it
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(model, SVDScaleShiftConfig())
    assert get_peft_model(model, SVDScaleShiftConfig(target_modules=["0"])).base_model.targeted_module_names == ["0"]


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"rank": 0}, "`rank` is 0"),
        ({"rank": 1.5}, "`rank` is 1.5"),
        ({"rank": True}, "`rank` is True"),
        ({"rank": "64"}, "`rank` is '64'"),
        ({"scale": "no"}, "`scale` is 'no'; it can be True or False"),
        ({"rank_pattern": {"q": -1}}, r"`rank_pattern\['q'\]` is -1"),
        ({"nonlinearity": "gelu"}, "`nonlinearity` is 'gelu'; it can be 'relu', 'none'"),
        ({"bias": "lora_only"}, "`bias` is 'lora_only'"),
        ({"scale": False, "shift": False}, "Nothing would learn"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        SVDScaleShiftConfig(**choices)
