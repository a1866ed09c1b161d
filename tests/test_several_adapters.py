"""Several adapters over one shared basis: mixed batches, exact sums and swapping in place."""

import copy
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import T5Config, T5ForConditionalGeneration

from svdtune import SVDScaleShiftConfig, hotswap_adapter


class Net(nn.Module):
    """One layer of each kind that a mixed batch can run through."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.conv = nn.Conv1d(12, 16, 3, groups=2)
        self.fc = nn.Linear(16, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, tokens):
        x = self.conv(self.embedding(tokens).mT).mT
        return self.head(self.fc(x).tanh())


TARGETS = ["embedding", "conv", "fc"]
ADAPTERS = {
    "paper": {},
    "low": {"rank": 3},
    "svf": {"shift": False, "nonlinearity": "none"},
    "elsewhere": {"target_modules": ["fc"]},
}


@pytest.fixture
def base(dtype):
    return Net().to(dtype).eval()


@pytest.fixture
def model(base, train):
    """The base model with four trained adapters, each of another sort."""
    model = None
    for name, choices in ADAPTERS.items():
        config = SVDScaleShiftConfig(**{"target_modules": TARGETS, **choices})
        if model is None:
            model = get_peft_model(copy.deepcopy(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        train(model, name)
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 30, (6, 7))


@pytest.fixture
def tolerance(dtype):
    return {"rtol": 0, "atol": {torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]}


def output_of(model, adapters, tokens):
    model.base_model.set_adapter(adapters)
    return model(tokens)


# Mixed batches


def test_each_sample_of_a_mixed_batch_gets_its_own_adapter(model, base, tokens, tolerance):
    names = ["low", "__base__", "paper", "elsewhere", "svf", "low"]
    mixed = model(tokens, adapter_names=names)
    for row, name in enumerate(names):
        alone = base(tokens) if name == "__base__" else output_of(model, name, tokens)
        torch.testing.assert_close(mixed[row], alone[row], **tolerance)
    model.base_model.set_adapter("paper")
    torch.testing.assert_close(model(tokens)[2], mixed[2], **tolerance)


def test_threads_do_not_see_each_others_mixed_batches(model, tokens, tolerance):
    """While one thread is inside its pass, another computes with other names, and a third with none."""
    choices = [["paper"] * 6, ["svf"] * 6, None]

    def compute(names):
        return model(tokens) if names is None else model(tokens, adapter_names=names)

    alone = [compute(names) for names in choices]
    with ThreadPoolExecutor(3) as pool:
        for index, output in enumerate(pool.map(compute, choices * 20)):
            torch.testing.assert_close(output, alone[index % 3], **tolerance)


def test_a_mixed_batch_takes_modules_to_save_of_each_adapter(base, tokens):
    model = get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(target_modules=["fc"], modules_to_save=["head"]))
    model.add_adapter("other", SVDScaleShiftConfig(target_modules=["fc"], modules_to_save=["head"]))
    nn.init.constant_(model.base_model.model.head.modules_to_save["other"].bias, 7.0)
    model.eval()
    mixed = model(tokens[:2], adapter_names=["default", "other"])
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model(tokens[:2])[row])


def test_generation_takes_a_mixed_batch_with_beams(train):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    for parameter in t5.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = SVDScaleShiftConfig(target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(t5, config, adapter_name="one")
    model.add_adapter("two", copy.deepcopy(config))
    train(train(model, "one"), "two").eval()
    tokens = torch.randint(1, 40, (3, 6))
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    mixed = model.generate(input_ids=tokens, adapter_names=["two", "one", "__base__"], **options)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = model.generate(input_ids=tokens, **options)
    with model.disable_adapter():
        alone["base"] = model.generate(input_ids=tokens, **options)
    for row, name in enumerate(["two", "one", "base"]):
        assert mixed[row].tolist() == alone[name][row].tolist()
    assert len({tuple(output[0].tolist()) for output in alone.values()}) > 1


@pytest.mark.parametrize(
    "names, message",
    [(["low"] * 5, "same as the number of inputs, but got 5 and 6"), (["lo"] * 6, "non-existing adapter.*: lo$")],
)
def test_a_mixed_batch_with_wrong_names_is_refused(names, message, model, tokens):
    with pytest.raises(ValueError, match=message):
        model(tokens, adapter_names=names)
    model(tokens)


def test_a_mixed_batch_is_refused_while_training_or_merged(model, tokens):
    with pytest.raises(ValueError, match="training mode"):
        model.train()(tokens, adapter_names=["low"] * 6)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(tokens, adapter_names=["low"] * 6)


# Sums


def changes(model, name):
    layers = {target: model.base_model.model.get_submodule(target) for target in TARGETS}
    return {target: layer.get_delta_weight(name) for target, layer in layers.items() if layer.has_adapter(name)}


def test_a_weighted_sum_of_adapters_is_exact(model, relative_error):
    weights = {"paper": 0.7, "low": -1.5, "svf": 2.0, "elsewhere": 0.4}
    model.base_model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    for target, actual in changes(model, "sum").items():
        expected = sum(weight * changes(model, name).get(target, 0) for name, weight in weights.items())
        assert relative_error(actual, expected) < 1e-5
    assert "sum" not in model.active_adapters


def test_a_negated_adapter_takes_its_change_back(model, base, tokens, tolerance):
    model.base_model.add_weighted_adapter(["paper"], [-1.0], "minus")
    both = output_of(model, ["paper", "minus"], tokens)
    torch.testing.assert_close(both, base(tokens), **tolerance)


def test_a_sum_is_saved_and_loaded_like_any_adapter(model, base, tokens, tmp_path, tolerance):
    model.base_model.add_weighted_adapter(["paper", "low"], [0.5, 0.5], "sum")
    expected = output_of(model, "sum", tokens)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "sum")(tokens), expected, **tolerance)


@pytest.mark.parametrize("combination_type", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_pefts_other_combinations_act_on_the_changes(combination_type, model, relative_error):
    options = {"combination_type": combination_type}
    model.base_model.add_weighted_adapter(["paper"], [1.0], "kept_all", density=1.0, **options)
    model.base_model.add_weighted_adapter(["paper"], [1.0], "kept_half", density=0.5, **options)
    for target, change in changes(model, "paper").items():
        assert relative_error(changes(model, "kept_all")[target], change) < 1e-5
    kept = model.base_model.model.fc.delta_of("kept_half").count_nonzero()
    assert 0 < kept < 16


def test_a_sum_tunes_the_same_layers_at_the_same_ranks_and_no_others():
    base = nn.ModuleDict({"fc": nn.Linear(8, 8), "block": nn.ModuleDict({"fc": nn.Linear(8, 8)})})
    base["block"]["deep"] = nn.ModuleDict({"fc": nn.LayerNorm(8)})
    config = SVDScaleShiftConfig(target_modules="fc|block.fc", rank=2, rank_pattern={"block.fc": 6})
    model = get_peft_model(base, config)
    model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    ranks = [layer.rank for layer in model.modules() if hasattr(layer, "spectrum")]
    assert ranks == [{"default": 2, "sum": 2}, {"default": 6, "sum": 6}]


def test_a_sum_warns_of_modules_trained_whole(base):
    model = get_peft_model(base, SVDScaleShiftConfig(target_modules=["fc"], modules_to_save=["head"]))
    with pytest.warns(UserWarning, match="Fully trained modules and tokens .* are not combined"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["paper"], [1], "sum", "ties", 0.0), "`density` is 0.0; it must be above 0 and at most 1"),
        ((["paper"], [1], "sum", "ties", 0.5, "most"), "`majority_sign_method` is 'most'"),
        ((["paper", "nobody"], [1, 1], "sum"), "no adapter nobody; there are paper, low, svf, elsewhere"),
        ((["paper"], [1, 1], "sum"), "1 adapters need as many weights, not 2"),
        ((["paper"], [1], "low"), "an adapter 'low' already"),
        ((["paper"], [1], "sum", "svd"), "`combination_type` is 'svd'; it can be linear"),
        ((["paper"], [1], "sum", "ties"), "'ties' needs a `density`"),
    ],
)
def test_a_sum_that_cannot_be_is_refused(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments)


def test_layers_that_do_not_convert_to_lora_are_named(base):
    model = get_peft_model(base, SVDScaleShiftConfig(target_modules=["embedding", "fc"]))
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*Embedding"):
        peft.convert_to_lora(model, rank=4)


def test_an_adapter_converts_to_lora(base, train, relative_error):
    base = base.float()
    model = train(get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(target_modules=["fc"], rank=4)))
    expected = model.base_model.model.fc.get_delta_weight("default")
    lora_config, state_dict = peft.convert_to_lora(model, rank=4)
    lora = get_peft_model(base, lora_config)
    peft.set_peft_model_state_dict(lora, state_dict)
    assert relative_error(lora.base_model.model.fc.get_delta_weight("default"), expected) < 1e-4


# Switching in place


@pytest.fixture
def saved(base, train, tmp_path):
    """Folders of two adapters of one shape, and the outputs that they give."""
    tokens = torch.arange(28).view(4, 7)
    outputs = {}
    for seed in range(2):
        torch.manual_seed(seed)
        config = SVDScaleShiftConfig(target_modules=TARGETS, modules_to_save=["head"])
        model = train(get_peft_model(copy.deepcopy(base), config)).eval()
        nn.init.constant_(model.base_model.model.head.modules_to_save["default"].bias, float(seed))
        model.save_pretrained(tmp_path / str(seed))
        outputs[tmp_path / str(seed)] = model(tokens)
    return tokens, outputs


def test_hotswap_overwrites_the_values_in_place(base, saved):
    tokens, outputs = saved
    first, second = outputs
    model = PeftModel.from_pretrained(base, first)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    factors = model.base_model.model.fc.spectrum.left.data_ptr()
    for folder in (second, first, second):
        hotswap_adapter(model, folder)
        assert torch.equal(model(tokens), outputs[folder])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses
    assert model.base_model.model.fc.spectrum.left.data_ptr() == factors


def test_hotswap_does_not_compile_again(base, saved):
    tokens, outputs = saved
    first, second = outputs
    model = PeftModel.from_pretrained(base, first)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(tokens)
    frames = counter.frame_count
    hotswap_adapter(compiled, second)
    torch.testing.assert_close(compiled(tokens), outputs[second])
    assert counter.frame_count == frames == 1


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"rank": 2}, r"6 values differ, conv\.svd_scale_shift_a\.weight is \(4,\) and not \(16,\)"),
        ({"target_modules": ["fc"]}, r"4 values differ, conv\.svd_scale_shift_a\.weight is missing and not \(16,\)"),
        ({"target_modules": [*TARGETS, "embedding", "head"], "modules_to_save": None}, "values differ"),
        ({"shift": False}, "its `shift` is False, and not True"),
        ({"nonlinearity": "none"}, "its `nonlinearity` is 'none', and not 'relu'"),
    ],
)
def test_hotswap_refuses_an_adapter_of_another_sort(choices, message, base, saved, train, tmp_path):
    tokens, outputs = saved
    model = PeftModel.from_pretrained(base, next(iter(outputs)))
    before = model(tokens)
    config = SVDScaleShiftConfig(**{"target_modules": TARGETS, "modules_to_save": ["head"], **choices})
    train(get_peft_model(Net(), config)).save_pretrained(tmp_path / "other")
    with pytest.raises((ValueError, RuntimeError), match=message):
        hotswap_adapter(model, tmp_path / "other")
    assert torch.equal(model(tokens), before)


def test_hotswap_refuses_an_adapter_of_another_method(base, saved, tmp_path):
    get_peft_model(Net(), peft.LoraConfig(target_modules=["fc"])).save_pretrained(tmp_path / "lora")
    model = PeftModel.from_pretrained(base, next(iter(saved[1])))
    with pytest.raises(ValueError, match="an adapter of another method, LoraConfig"):
        hotswap_adapter(model, tmp_path / "lora")


def test_hotswap_refuses_other_tokens(tmp_path):
    for name, tokens in {"first": [1, 2], "second": [3, 4]}.items():
        config = SVDScaleShiftConfig(target_modules=["fc"], trainable_token_indices={"embedding": tokens})
        get_peft_model(Net(), config).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(Net(), tmp_path / "first")
    with pytest.raises(ValueError, match="its `trainable_token_indices` is"):
        hotswap_adapter(model, tmp_path / "second")


def test_hotswap_refuses_a_merged_or_missing_adapter(base, saved):
    with pytest.raises(ValueError, match="no adapter 'default' to replace"):
        hotswap_adapter(base, next(iter(saved[1])))
    folder = next(iter(saved[1]))
    model = PeftModel.from_pretrained(base, folder)
    with pytest.raises(ValueError, match="no adapter 'other' to replace"):
        hotswap_adapter(model, folder, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; unmerge_adapter"):
        hotswap_adapter(model, folder)


# Weights, as diffusers' `set_adapters([...], weights)` gives them


@torch.no_grad()
@pytest.mark.parametrize("choices", [{}, {"rank": 3}], ids=["full rank", "rank"])
def test_adapters_are_weighted_as_diffusers_does(choices, dtype, train, relative_error):
    weights = {"one": 0.5, "two": -0.25}
    base = nn.Sequential(nn.Linear(16, 20)).to(dtype)
    x, weight = torch.randn(5, 16).to(dtype), base[0].weight.double().clone()
    config = SVDScaleShiftConfig(target_modules=["0"], **choices)
    model = get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", config)
    train(train(model, "one"), "two").base_model.set_adapter(list(weights))
    layer, expected = model.base_model.model[0], weight.clone()
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    for name, factor in weights.items():
        change = layer.delta_of(name).double()
        expected += factor * left[:, : len(change)] @ torch.diag(change) @ right[: len(change)]
        layer.set_scale(name, factor)
    layer.set_scale("unknown", 3.0)
    output = x.double() @ expected.mT + layer.bias.double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert relative_error(model(x), output) < tolerance

    layer.scale_layer(2.0)
    assert relative_error(model(x), output) > 0.05
    layer.unscale_layer(2.0)
    model.merge_adapter()
    assert relative_error(model(x), output) < tolerance
    model.unmerge_adapter()
    model.delete_adapter("two")
    assert layer.scaling == {"one": weights["one"]}
    layer.unscale_layer()
    assert layer.scaling == {}
