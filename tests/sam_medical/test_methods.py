"""The trained parameters of each method, and their agreement with the papers."""

import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import SamConfig, SamModel

from sam_medical.adapters.adapter import load_adapter, save_adapter
from sam_medical.adapters.building import build_model
from sam_medical.adapters.model_card import model_card
from sam_medical.adapters.task import Task
from sam_medical.common.errors import UserError
from sam_medical.methods import METHODS
from sam_medical.methods.tuning import count_trainable, parameter_groups
from sam_medical.models.loading import load_backbone
from sam_medical.models.prompts import TextPrompts
from sam_medical.models.sam import Sam
from sam_medical.models.sam_parts import decoder_with_masks

LABELS = ("liver", "tumor", "kidney")
TEXT = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))


SAM_METHODS = [name for name, method in METHODS.items() if method.is_sam]
NETWORKS = [name for name, method in METHODS.items() if not method.is_sam]


def task_of(backbone):
    return lambda method: Task("glas", LABELS, str(backbone), 64, "minilm", method=method)


@pytest.fixture(params=["lite-medsam", "vit"])
def task(request, tiny_sam_folder):
    return task_of("lite-medsam" if request.param == "lite-medsam" else tiny_sam_folder)


def batch():
    images, masks = torch.rand(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)
    masks[:, 0, 5:40, 8:30] = 1
    masks[1, 1, 40:60, 40:64] = 1
    return images, masks


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_a_step(model):
    """A large one, so that every value that learns is another afterwards."""
    images, masks = batch()
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # what starts at zero lets nothing through to what stands before it
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(images, masks), masks).backward()
        optimizer.step()


@pytest.mark.parametrize("name", SAM_METHODS)
def test_a_trained_method_is_saved_and_loaded(name, task, tmp_path):
    check_saving_and_loading(name, task, tmp_path)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trained_network_is_saved_and_loaded(name, tmp_path):
    check_saving_and_loading(name, task_of("none"), tmp_path)


def check_saving_and_loading(name, task, tmp_path):
    method = METHODS[name]
    torch.manual_seed(0)
    model, described = build_model(task(name), TEXT)
    images, masks = batch()
    untrained = {key: value.clone() for key, value in model.state_dict().items()}
    if method.learns:
        take_a_step(model)
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, untrained[key])}
        assert trained(model) <= changed <= trained(model) | set(dict(model.named_buffers()))
    model.eval()
    expected = model(images, masks)
    assert expected.shape == (2, 3, 64, 64) and expected.isfinite().all()

    (tmp_path / "adapter").mkdir()
    save_adapter(model, TEXT, described, tmp_path / "adapter")
    torch.manual_seed(1)
    loaded, _ = load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(loaded(images, masks), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, learning",
    [
        ("s-sam", {"svd_scale_shift_", "norm", "position", "text_affine"}),
        ("s-sam-late", {"svd_scale_shift_", "norm", "position", "text_affine"}),
        ("lora", {"lora_", "norm", "position", "text_affine"}),
        ("salt", {".down.", ".up.", "svd_scale_shift_", "norm", "position", "text_affine"}),
        ("samed", {"lora_", "mask_decoder", "no_mask_embed"}),
        ("adaptive-sam", {"bias", "norm", "position", "mask_decoder", "text_affine"}),
        ("medical-sam-adapter", {"bottleneck", "text_affine"}),
        ("auto-sam", {"prompts."}),
        ("sono-sam", {"point_embed", "not_a_point_embed", "no_mask_embed", "mask_decoder"}),
        ("ablation-positions", {"position"}),
        ("ablation-norms", {"position", "norm"}),
        ("ablation-text", {"position", "text_affine"}),
        ("ablation-scale", {"position", "text_affine", "svd_scale_shift_a"}),
        ("ablation-shift", {"position", "text_affine", "svd_scale_shift_b"}),
        ("zero-shot-text", set()),
        ("zero-shot-box", set()),
    ],
)
def test_what_learns(name, learning, task):
    model, described = build_model(task(name), TEXT)
    # LiteMedSAM's neck is a sequence, whose norms have no name.
    names = {re.sub(r"(neck\.)([13])\.", r"\1norm\2.", name) for name in trained(model)}
    if described.backbone == "lite-medsam":  # its points stand in a box, and need no padding
        learning = learning - {"not_a_point_embed"}
    assert all(any(mark in n for mark in learning) for n in names)
    assert all(any(mark in n for n in names) for mark in learning)
    if "mask_decoder" not in learning:
        assert not any("mask_decoder" in n and "bottleneck" not in n for n in names)
    assert METHODS[name].learns == bool(learning)


def test_late_placement_leaves_the_first_blocks_alone(task):
    model, _ = build_model(task("s-sam-late"), TEXT)
    early, _ = build_model(task("s-sam"), TEXT)
    late = [n for n in trained(model) if "svd_scale_shift_" in n]
    every = [n for n in trained(early) if "svd_scale_shift_" in n]
    assert set(late) < set(every) and 0.25 < len(late) / len(every) < 0.45
    assert not any("layers.0." in n or "layers.1." in n for n in late)


def test_samed_changes_queries_and_values_by_a_low_rank_of_their_own_and_no_keys(task):
    torch.manual_seed(0)
    model, _ = build_model(task("samed"), TEXT)
    take_a_step(model)
    checked = 0
    for name, module in model.named_modules():
        if name.endswith(".qkv"):
            change = module.get_delta_weight("default")
            queries, values = model.query_and_value_rows()[name]
            keys = sorted(set(range(len(change))) - {*queries.tolist(), *values.tolist()})
            assert (change[keys] == 0).all()
            for rows in (queries, values):
                assert torch.linalg.matrix_rank(change[rows]) == 4
            checked += 1
            width = change.shape[1]
            learning = sum(
                getattr(p, "values_that_learn", p.numel()) for n, p in module.named_parameters() if "lora" in n
            )
            assert learning == 2 * 4 * (width + width)  # a pair for queries and one for values
    assert checked


def test_queries_and_values_are_the_rows_that_the_attention_takes_them_from(task):
    """Told by what a change of the keys' rows does to attention whose queries are zero: nothing."""
    model, _ = build_model(task("zero-shot-text"), TEXT)
    qkv_name, qkv = next((n, m) for n, m in model.named_modules() if n.endswith(".qkv"))
    attention = model.get_submodule(qkv_name.removesuffix(".qkv"))
    queries, values = model.query_and_value_rows()[qkv_name]
    keys = sorted(set(range(qkv.out_features)) - {*queries.tolist(), *values.tolist()})
    width = qkv.in_features
    x = torch.randn(2, 49, width) if hasattr(attention, "heads") else torch.randn(2, 3, 3, width)

    def attend():
        out = attention(x)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        qkv.weight[queries] = 0
        qkv.bias[queries] = 0
        before = attend()
        qkv.weight[keys] += torch.randn(len(keys), width)
        torch.testing.assert_close(attend(), before)
        qkv.weight[values] += 1
        assert (attend() - before).abs().max() > 1e-2


@torch.no_grad()
def test_a_decoder_with_more_masks_starts_with_those_it_had(tiny_sam_folder):
    backbone = load_backbone(str(tiny_sam_folder), 64)
    wider = decoder_with_masks(backbone.mask_decoder, 5)
    arguments = {
        "image_embeddings": torch.randn(1, 256, 4, 4),
        "image_positional_embeddings": torch.randn(1, 256, 4, 4),
        "sparse_prompt_embeddings": torch.randn(1, 1, 2, 256),
        "dense_prompt_embeddings": torch.randn(1, 256, 4, 4),
        "multimask_output": True,
    }
    masks, quality = wider(**arguments)
    assert masks.shape[:3] == (1, 1, 5) and quality.shape == (1, 1, 5)
    # Tokens that repeat another's take part in the attention, so that only their equality is exact.
    torch.testing.assert_close(masks[:, :, 3:], masks[:, :, :2], atol=1e-5, rtol=1e-4)
    same, _ = decoder_with_masks(backbone.mask_decoder, 3)(**arguments)
    torch.testing.assert_close(same, backbone.mask_decoder(**arguments)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["medical-sam-adapter", "samed", "salt", "lora", "s-sam"])
def test_what_is_put_in_changes_nothing_at_first(name, task):
    torch.manual_seed(0)
    model, _ = build_model(task(name), TEXT)
    torch.manual_seed(0)
    plain, _ = build_model(task("zero-shot-text"), TEXT)
    images = torch.rand(1, 3, 64, 64)
    encode = (lambda m: m.get_base_model()) if isinstance(model, PeftModel) else (lambda m: m)
    torch.testing.assert_close(encode(model).image_encoder(images), plain.image_encoder(images), atol=2e-4, rtol=1e-3)


def test_parameter_count_of_vit_b_at_256_pixels():
    """As the paper's parts add up with the norms of the neck, and the decoder frozen."""
    with torch.device("meta"):
        sam = SamModel(SamConfig())
    sam = sam.to_empty(device="cpu")
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    backbone = Sam.of(sam, "vit-b", 256).prompt_with(TextPrompts(torch.randn(1, 512), 256))
    tuned = METHODS["s-sam"].tuner.apply(backbone, backbone.target_modules)

    counts = {"scale and shift": 0, "position": 0, "text affine": 0, "neck norms": 0, "encoder norms": 0}
    for name, parameter in tuned.named_parameters():
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
    assert sum(counts.values()) == count_trainable(tuned) == 441_088


@pytest.mark.parametrize("name", [name for name in SAM_METHODS if METHODS[name].learns])
def test_all_that_a_method_trains_gets_a_gradient(name, task):
    """So that its trained values are what learns, and several processes wait for nothing that does not come."""
    check_gradients(name, task)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_that_a_network_trains_gets_a_gradient(name):
    check_gradients(name, task_of("none"))


def check_gradients(name, task):
    model, _ = build_model(task(name), TEXT)
    images, masks = batch()
    model(images, masks).square().mean().backward()
    assert trained(model) == {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_decay_touches_the_text_affine_matrix_alone_and_a_and_b_have_a_rate_of_their_own(task):
    model, _ = build_model(task("s-sam"), TEXT)
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=0.01, value_rate=5)
    decaying = [parameter.shape for group in groups if group["weight_decay"] for parameter in group["params"]]
    assert decaying == [(256, 10)]
    grouped = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert grouped == count_trainable(model)
    (values,) = (group["params"] for group in groups if group["lr"] == 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {id(value) for value in values} == {key for key, name in names.items() if "svd_scale_shift_" in name}


def test_the_statistics_of_batch_norms_are_kept():
    model, _ = build_model(task_of("none")("segnet"), TEXT)
    assert any(name.endswith("running_var") for name in METHODS["segnet"].tuner.state(model))


def test_a_model_card_says_what_is_in_the_folder(task):
    cards = {}
    for name in ("s-sam", "u-net", "sono-sam", "samed"):
        _, described = build_model(task(name), TEXT)
        cards[name] = model_card(described)
    assert "library_name: peft" in cards["s-sam"] and "`import svdtune`" in cards["s-sam"]
    assert "by the names alone" in cards["s-sam"] and "weights with digest" in cards["s-sam"]
    for absent in ("library_name", "Base model", "Text encoder", "by the names"):
        assert absent not in cards["u-net"]
    assert "predict.py" in cards["u-net"] and "predict.py" not in cards["sono-sam"]
    assert "no softmax over labels" in cards["samed"]


def test_an_expression_of_layers_is_refused_where_it_has_no_meaning(task):
    for name in ("samed", "u-net", "auto-sam"):
        with pytest.raises(UserError, match="target_modules has no meaning for"):
            build_model(replace(task(name), target_modules=".*qkv"), TEXT)
