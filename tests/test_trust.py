"""An untrusted adapter does no harm, and a changed adapter is detected."""

import copy
import json
import os
import time
import warnings

import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from svdtune import SVDScaleShiftConfig, hotswap_adapter
from svdtune.kinds import Linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.tensor([[1, 3, 5, 7]])


def bert():
    torch.manual_seed(5)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(**size, vocab_size=30, initializer_range=0.2)).eval()


@pytest.fixture
def saved(tmp_path, train):
    folder = tmp_path / "adapter"
    choices = {"target_modules": ["query", "value"], "modules_to_save": ["pooler"]}
    train(get_peft_model(bert(), SVDScaleShiftConfig(**choices))).save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    content = json.loads((folder / CONFIG).read_text())
    content.update(changes)
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(folder, change, digests=...):
    """Changes the tensors, as a stranger would who leaves the digests out."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    edit_config(folder, digests=digests)


def loaders(folder):
    yield lambda: PeftModel.from_pretrained(bert(), str(folder))
    yield lambda: bert().load_adapter(str(folder))
    model = PeftModel.from_pretrained(bert(), str(folder))
    yield lambda: model.load_adapter(str(folder), "second")
    yield lambda: hotswap_adapter(model, str(folder))
    yield lambda: SVDScaleShiftConfig.from_pretrained(str(folder))
    base = folder.parent / "base"
    bert().save_pretrained(base)
    edit_config(folder, base_model_name_or_path=str(base))
    yield lambda: AutoPeftModel.from_pretrained(str(folder))


# Harm


def test_a_file_does_not_choose_folders_of_this_machine(saved, tmp_path, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    (models / "model.safetensors").write_bytes(b"weights")
    os.utime(models / "model.safetensors", (1000, 1000))
    monkeypatch.setattr("svdtune.cache.MAXIMUM_BYTES", 0)
    edit_config(saved, svd_cache=str(models), strict=True)
    for load in loaders(saved):
        with pytest.warns(UserWarning, match="sets `svd_cache` and `strict`, which no file may"):
            load()
    assert [path.name for path in models.iterdir()] == ["model.safetensors"]


def test_neither_does_a_file_that_does_not_say_its_method(saved):
    edit_config(saved, svd_cache="/somewhere", strict=True, peft_type=...)
    config = SVDScaleShiftConfig.from_pretrained(str(saved))
    assert (config.svd_cache, config.strict, config.read_from_file) == (None, False, True)


def test_who_loads_an_adapter_may_name_a_cache(saved, tmp_path):
    cache = tmp_path / "cache"
    PeftModel.from_pretrained(bert(), str(saved), svd_cache=str(cache), strict=True)
    assert len(list(cache.rglob("*.safetensors"))) == 4


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"target_modules": r"([a-z_.]+\d?)+!"}, "`target_modules`"),
        ({"exclude_modules": r"(.*.*.*.*.*.*.*.*.*)x"}, "`exclude_modules`"),
        ({"rank_pattern": {r"(\w|\w\w|\.)*!": 5}}, r"`rank_pattern\[.*\]`"),
        ({"layers_to_transform": [0], "layers_pattern": r"([a-z.]*)*\d\dx"}, "`layers_pattern`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("load", ["peft", "transformers"])
def test_an_expression_that_would_never_end_is_refused(changes, name, load, saved, monkeypatch):
    monkeypatch.setattr("svdtune.expressions.SECONDS", 1)
    edit_config(saved, **changes)
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"{name}.* takes more than 1 seconds to be matched"):
        PeftModel.from_pretrained(bert(), str(saved)) if load == "peft" else bert().load_adapter(str(saved))
    assert time.monotonic() - started < 20


def test_an_expression_that_is_not_plainly_harmless_is_tried_and_used(saved):
    edit_config(saved, target_modules=r"encoder\.layer\.(0|1)+\.attention\.(self\.)*((query)|(value)){1}")
    assert len(PeftModel.from_pretrained(bert(), str(saved)).base_model.targeted_module_names) == 4


def test_saving_goes_through_no_link_and_leaves_readable_files(saved, tmp_path):
    """Somebody has put a link where the model card's temporary file could be, and another in the card's place."""
    target = tmp_path / "target.txt"
    target.write_text("precious")
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "README.md").symlink_to(target)
    SVDScaleShiftConfig.from_pretrained(str(saved)).save_pretrained(str(folder))
    assert target.read_text() == "precious"
    assert not (folder / "README.md").is_symlink()
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~umask}
    assert not list(saved.glob("*.tmp")) + list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"target_modules": [f"a.b{number}" for number in range(5000)]}, "`target_modules` has 5000 entries"),
        ({"modules_to_save": [f"m{number}" for number in range(3000)]}, "`modules_to_save` has 3000 entries"),
        ({"rank_pattern": {f"m{number}": 3 for number in range(50_000)}}, "`rank_pattern` has 50000 entries"),
        ({"target_modules": "(?i)" + "[\x00-\U0010ffff]" * 5000}, "takes more than 1 seconds"),
        ({"target_modules": "(" * 2000}, "`target_modules` is not a valid regular expression"),
    ],
    ids=["targets", "modules to save", "ranks", "long to compile", "long and wrong"],
)
def test_a_config_that_would_keep_the_process_busy_is_refused(changes, message, saved, monkeypatch):
    monkeypatch.setattr("svdtune.expressions.SECONDS", 1)
    edit_config(saved, digests=..., **changes)
    started = time.monotonic()
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(bert(), str(saved))
    assert time.monotonic() - started < 20


def test_a_config_is_not_written_through_a_link(saved, tmp_path, train):
    target = tmp_path / "target.txt"
    target.write_text("precious")
    (saved / CONFIG).unlink()
    (saved / CONFIG).symlink_to(target)
    train(get_peft_model(bert(), SVDScaleShiftConfig(target_modules=["query"]))).save_pretrained(saved)
    assert target.read_text() == "precious" and not (saved / CONFIG).is_symlink()
    PeftModel.from_pretrained(bert(), str(saved), strict=True)


# Values that are not the adapter's


SCALE = "base_model.model.encoder.layer.0.attention.self.query.svd_scale_shift_a.weight"
BASE = "base_model.model.encoder.layer.0.attention.self.query.base_layer.weight"
POOLER = "base_model.model.pooler.dense.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.update({BASE: torch.zeros(16, 16)}), f"do not exist in this model, {BASE}"),
        (
            lambda tensors: tensors.update({"other.weight": torch.zeros(3)}),
            "do not exist in this model, other.weight",
        ),
        (lambda tensors: tensors[POOLER].fill_(float("nan")), "hold NaN or infinite values, .*pooler.*dense.weight"),
        (lambda tensors: tensors[SCALE].fill_(float("inf")), "hold NaN or infinite values, .*query.svd_scale_shift_a"),
        (
            lambda tensors: tensors.update({SCALE: torch.ones(16).int()}),
            "are not floating-point .*query.svd_scale_shift_a",
        ),
        (
            lambda tensors: tensors.update({SCALE: torch.ones(16) > 0}),
            "are not floating-point .*query.svd_scale_shift_a",
        ),
        (lambda tensors: tensors.update({POOLER: torch.ones(16, 16).long()}), "are not floating-point .*pooler"),
    ],
    ids=["base weight", "unknown", "NaN in a module", "infinite A", "integer A", "boolean A", "integer module"],
)
def test_values_of_another_kind_are_refused_by_name(change, message, saved):
    edit_tensors(saved, change)
    base = bert()
    weight = base.encoder.layer[0].attention.self.query.weight.clone()
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, str(saved))
    assert torch.equal(base.get_parameter("encoder.layer.0.attention.self.query.base_layer.weight"), weight)


def test_embeddings_that_peft_saves_are_taken_with_a_warning(tmp_path, train):
    base = bert()
    base.embeddings.word_embeddings.weight.data[3] += 1
    model = train(get_peft_model(base, SVDScaleShiftConfig(target_modules=["query"])))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match="brings embeddings of its own, .*word_embeddings.weight"):
        again = PeftModel.from_pretrained(bert(), str(tmp_path))
    torch.testing.assert_close(again(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)
    edit = load_file(tmp_path / WEIGHTS)
    edit["base_model.model.embeddings.word_embeddings.weight"][3, 3] += 1
    save_file(edit, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"`embeddings\.word_embeddings\.weight` has changed since it was saved"):
        PeftModel.from_pretrained(bert(), str(tmp_path))


def llama(folder):
    torch.manual_seed(5)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=30, initializer_range=0.2))
    if not folder.exists():
        model.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(34, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize(
    "choices",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 31]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_what_peft_saves_of_a_resized_vocabulary_is_loaded_and_swapped(choices, tmp_path, train):
    torch.manual_seed(7)
    base = llama(tmp_path / "base")
    model = get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(**{"target_modules": ["q_proj"], **choices}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.eval()(TOKENS).logits
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(again.eval()(TOKENS).logits, expected)
    if "target_modules" in choices:
        hotswap_adapter(again, str(tmp_path / "adapter"))
        torch.testing.assert_close(again(TOKENS).logits, expected)


# Digests


@pytest.mark.parametrize("name", [SCALE, POOLER])
def test_one_changed_bit_is_noticed_by_the_name_of_its_tensor(name, saved):
    model = PeftModel.from_pretrained(bert(), str(saved))
    before = model(TOKENS).last_hidden_state
    tensors = load_file(saved / WEIGHTS)
    tensors[name].view(torch.int32).view(-1)[3] ^= 1
    save_file(tensors, saved / WEIGHTS)
    message = rf"{saved / WEIGHTS} is damaged: `{name.removeprefix('base_model.model.')}` has changed"
    for load in (
        lambda: PeftModel.from_pretrained(bert(), str(saved)),
        lambda: model.load_adapter(str(saved), "second"),
        lambda: hotswap_adapter(model, str(saved)),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    assert torch.equal(model(TOKENS).last_hidden_state, before)


def test_a_changed_meaning_is_noticed(saved):
    edit_config(saved, nonlinearity="none")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged: one of `nonlinearity`.*has changed"):
        PeftModel.from_pretrained(bert(), str(saved))


def test_an_adapter_of_the_hub_is_checked_when_its_weights_are_there(saved, monkeypatch):
    """The hub's cache stands in for the hub: a name that is no folder, and files that are found for it."""
    tensors = load_file(saved / WEIGHTS)
    tensors[POOLER].view(torch.int32).view(-1)[3] ^= 1
    save_file(tensors, saved / WEIGHTS)

    def download(name, file, **options):
        assert name == "somebody/adapter"
        return str(saved / file)

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda **options: True)
    with pytest.raises(ValueError, match=r"adapter 'default' is damaged: `pooler\.dense\.weight` has changed"):
        PeftModel.from_pretrained(bert(), "somebody/adapter")


def flipped(saved):
    tensors = load_file(saved / WEIGHTS)
    tensors[SCALE].view(torch.int32).view(-1)[3] ^= 1
    return tensors


def test_weights_are_checked_whoever_reads_the_config(saved):
    """PEFT's own class reads a config without asking ours."""
    save_file(flipped(saved), saved / WEIGHTS)
    with pytest.raises(ValueError, match=r"'default' is damaged: .*query.svd_scale_shift_a.weight` has changed"):
        PeftModel.from_pretrained(bert(), str(saved), config=PeftConfig.from_pretrained(str(saved)))


def test_weights_that_are_not_safetensors_are_checked_too(saved):
    torch.save(flipped(saved), saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"'default' is damaged: .*query.svd_scale_shift_a.weight` has changed"):
        PeftModel.from_pretrained(bert(), str(saved))


@pytest.mark.parametrize("order", ["weights first", "config first, then trained further"])
def test_weights_and_config_that_are_written_by_hand_fit_each_other(order, tmp_path, train):
    model = train(get_peft_model(bert(), SVDScaleShiftConfig(target_modules=["query"])))
    state = get_peft_model_state_dict(model)
    if order == "weights first":
        save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / WEIGHTS)
        model.peft_config["default"].save_pretrained(str(tmp_path))
    else:
        train(model)
        model.peft_config["default"].save_pretrained(str(tmp_path))
        save_file(get_peft_model_state_dict(model), tmp_path / WEIGHTS)
    PeftModel.from_pretrained(bert(), str(tmp_path))


def test_what_is_trained_or_set_after_loading_is_saved_with_its_own_digests(saved, tmp_path, train):
    for trainable in (False, True):
        model = train(PeftModel.from_pretrained(bert(), str(saved), is_trainable=trainable))
        model.save_pretrained(tmp_path / str(trainable))
        again = PeftModel.from_pretrained(bert(), str(tmp_path / str(trainable)), strict=True)
        assert torch.equal(again(TOKENS).last_hidden_state, model.eval()(TOKENS).last_hidden_state)


def test_transformers_saves_and_reads_digests_too(tmp_path, train):
    model = bert()
    model.add_adapter(SVDScaleShiftConfig(target_modules=["query"]))
    train(model).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / CONFIG).read_text())["digests"]) == 2 * 2 + 1
    PeftModel.from_pretrained(bert(), str(tmp_path), strict=True)


def test_an_adapter_from_before_there_were_digests_loads_as_it_did(saved):
    expected = PeftModel.from_pretrained(bert(), str(saved))(TOKENS).last_hidden_state
    edit_config(saved, digests=..., format_version=...)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(bert(), str(saved))
    assert torch.equal(model(TOKENS).last_hidden_state, expected)
    with pytest.raises(ValueError, match="as `strict` asks for: its config has no `digests`"):
        PeftModel.from_pretrained(bert(), str(saved), strict=True)


def test_an_adapter_of_a_later_version_is_refused(saved):
    edit_config(saved, format_version=99)
    with pytest.raises(ValueError, match=r"`format_version` is 99; .* Install a newer svdtune"):
        PeftModel.from_pretrained(bert(), str(saved))


# Fingerprints


def without_one(fingerprints):
    return dict(list(fingerprints.items())[1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda fingerprints: {name: [float("nan")] * 8 for name in fingerprints},
        lambda fingerprints: {},
        lambda fingerprints: None,
        lambda fingerprints: {f"other.{name}": numbers for name, numbers in fingerprints.items()},
        lambda fingerprints: {**fingerprints, "other": [0.0] * 8},
        without_one,
    ],
    ids=["NaN", "{}", "null", "unknown names", "one more", "one less"],
)
def test_strict_refuses_what_it_cannot_compare(change, saved):
    fingerprints = json.loads((saved / CONFIG).read_text())["fingerprints"]
    PeftModel.from_pretrained(bert(), str(saved), strict=True)
    edit_config(saved, fingerprints=change(fingerprints))
    with pytest.raises(ValueError, match=r"cannot be checked, as `strict` asks for"):
        PeftModel.from_pretrained(bert(), str(saved), strict=True)
    PeftModel.from_pretrained(bert(), str(saved))


def test_a_new_adapter_may_be_strict():
    get_peft_model(bert(), SVDScaleShiftConfig(target_modules=["query"], strict=True))


# Arithmetic at the end of its range


@pytest.mark.parametrize("size", [1e-40, 1e-38, 1e-30, 1e30])
@pytest.mark.parametrize("choices", [{}, {"one_sided": True}, {"rank": 4}], ids=str)
def test_tiny_and_huge_weights_have_finite_vectors_and_the_papers_product(
    size, choices, train, paper_weight, relative_error
):
    torch.set_flush_denormal(False)
    linear = nn.Linear(12, 8, bias=False, dtype=torch.float32)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(8, 12).double() * size)
    layer = train(Linear(linear, "default", SVDScaleShiftConfig(**choices)))
    layer.svd_scale_shift_b["default"].weight.data *= size
    assert all(getattr(layer.spectrum, name).isfinite().all() for name in ("left", "right", "reciprocals"))
    x = torch.randn(3, 12)
    output = layer(x)
    torch.set_flush_denormal(True)
    assert output.isfinite().all()
    if size >= 1e-30:  # products of smaller ones have no digits left in float32
        rank = layer.rank["default"]
        scale, shift = torch.ones(8), torch.zeros(8)
        scale[:rank], shift[:rank] = layer.svd_scale_shift_scale["default"], layer.svd_scale_shift_shift["default"]
        expected = x.double() @ paper_weight(linear.weight, scale.detach(), shift.detach()).T
        assert relative_error(output, expected) < 1e-5
