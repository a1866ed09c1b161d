"""Quantised base models: only the adapter is trained, and unmerging restores every bit of the base model.

`make test` installs bitsandbytes, HQQ and torchao. Without them, their tests are skipped.
"""

import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig, OPTForCausalLM

import svdtune.wrapping
from svdtune import SVDScaleShiftConfig

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; `make test` brings it")
CPU_PACKS_4BIT = bool(bnb.nn.modules.has_avx512bf16())

pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge lora module to [48]-bit linear"),
    pytest.mark.filterwarnings("ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprecated"),
]


# bitsandbytes reads a block of 64 as part of one row on a CPU, so rows are multiples of that.
class Net(nn.Module):
    """Two layers to quantise and tune, and a head that stays as it is."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.fc2 = nn.Linear(128, 64)
        self.head = nn.Linear(64, 4)
        for layer in (self.fc1, self.fc2, self.head):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.normal_(layer.bias)

    def forward(self, x):
        return self.head(self.fc2(self.fc1(x).tanh()).tanh())


def four_bit(**options):
    def quantise(linear):
        layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **{"quant_type": "nf4", **options})
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return quantise


def eight_bit(linear):
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def hqq(linear):
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    dtype = linear.weight.dtype
    return quantize.HQQLinear(copy.deepcopy(linear), config, compute_dtype=dtype, device="cpu")


def torchao(linear):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = copy.deepcopy(linear)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


QUANTISERS = {
    "nf4": four_bit(compress_statistics=False),
    "nf4-double": four_bit(compress_statistics=True),
    "nf4-bfloat16": four_bit(compute_dtype=torch.bfloat16),
    "fp4": four_bit(quant_type="fp4"),
    "int8": eight_bit,
    "hqq": hqq,
    "torchao": torchao,
}
BITSANDBYTES = [name for name in QUANTISERS if name not in ("hqq", "torchao")]


def quantised(net, quantiser):
    """A copy of ``net`` whose two large layers are quantised."""
    net = copy.deepcopy(net).requires_grad_(False)
    net.fc1, net.fc2 = QUANTISERS[quantiser](net.fc1), QUANTISERS[quantiser](net.fc2)
    net.requires_grad_(False).train()
    net(torch.zeros(1, 64, dtype=net.head.weight.dtype))  # at the first call, bitsandbytes casts the bias for good
    if quantiser == "torchao":  # where PEFT looks up how to quantise a merged weight
        from torchao.quantization import Int8WeightOnlyConfig

        to_quantise = types.SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
        net.hf_quantizer = types.SimpleNamespace(quantization_config=to_quantise)
    net.is_loaded_in_4bit = net.is_loaded_in_8bit = quantiser in BITSANDBYTES  # where PEFT's LoRA looks
    return net.eval()


def config(**choices):
    return SVDScaleShiftConfig(**{"target_modules": ["fc1", "fc2"], **choices})


def quantised_layers(net):
    return net.fc1, net.fc2


def tuned_layers(model):
    return quantised_layers(model.base_model.model)


def weight_of(layer):
    """The weight that a quantised layer stands for, as PEFT reads it."""
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=int).get_base_weight(layer)


def bits(*layers):
    """All that layers hold: bitsandbytes' bytes and quantisation states; for HQQ and torchao what they stand for."""
    return [
        copy.deepcopy(dict(layer.state_dict()))
        if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        else {"weight": weight_of(layer), "bias": copy.deepcopy(layer.bias)}
        for layer in layers
    ]


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def one_format_on_every_cpu(monkeypatch):
    """Keeps bitsandbytes from changing, on some CPUs, the format of 4-bit weights at the first evaluation."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture(params=QUANTISERS)
def quantiser(request):
    return request.param


@pytest.fixture
def net():
    return Net().eval()


@pytest.fixture
def base(net, quantiser):
    return quantised(net, quantiser)


@pytest.fixture
def x():
    return torch.randn(6, 64)


@pytest.fixture
def model(base, train):
    """The quantised model, copied and tuned by an adapter that has learned."""
    return train(get_peft_model(copy.deepcopy(base), config())).eval()


# What an adapter does


def test_training_changes_the_adapter_and_nothing_else(base, x):
    before = bits(*quantised_layers(base))
    model = get_peft_model(base, config())
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [len(parameter) for parameter in trainable] == [64] * 4

    optimizer = torch.optim.AdamW(trainable, lr=0.03)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x), torch.arange(6) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert_same_bits(bits(*quantised_layers(model.unload())), before)


def test_an_untrained_or_disabled_adapter_leaves_every_bit_of_the_output(model, base, x):
    assert torch.equal(get_peft_model(copy.deepcopy(base), config()).eval()(x), base(x))
    assert not torch.allclose(model(x), base(x), rtol=0.1)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"], indirect=True)
def test_the_singular_values_are_those_of_the_weight_that_the_base_holds(
    net, quantiser, dtype, train, paper_weight, relative_error
):
    """Against the paper's formula, in float64, on the dequantised weight; for weights of either dtype."""
    # In eval mode, bitsandbytes would quantise the input to 8 bits as well.
    model = train(get_peft_model(quantised(net.to(dtype), quantiser), config())).train()
    for layer in tuned_layers(model):
        x = torch.randn(5, layer.base_layer.in_features).to(dtype)
        scale, shift = layer.svd_scale_shift_scale["default"], layer.svd_scale_shift_shift["default"]
        weight = paper_weight(layer.get_base_weight(), scale, shift)
        low_precision = torch.bfloat16 in (dtype, getattr(layer.base_layer, "compute_dtype", None))
        expected = x.double() @ weight.T + layer.base_layer.bias.double()
        assert layer(x).dtype is dtype
        assert relative_error(layer(x), expected) < (2e-2 if low_precision else 1e-5)


def test_several_adapters_act_alone_together_and_sample_by_sample(model, base, x, train):
    model.add_adapter("other", config(target_modules=["fc2"], rank=16))
    train(model, "other").eval()
    alone = {"default": model(x), "__base__": base(x)}
    model.set_adapter("other")
    alone["other"] = model(x)

    names = ["default", "__base__", "other", "other", "default", "__base__"]
    mixed = model(x, adapter_names=names)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mixed[1], alone["__base__"][1], rtol=0, atol=1e-6)

    model.base_model.set_adapter(["default", "other"])
    fc2 = model.base_model.model.fc2
    h = torch.randn(3, 128)
    changes = [F.linear(h, fc2.get_delta_weight(name)) for name in ("default", "other")]
    torch.testing.assert_close(fc2(h) - fc2.base_layer(h), sum(changes), rtol=2e-2, atol=2e-2)


# Saving and loading


def test_a_saved_adapter_loads_onto_the_same_base_quantised_anew(model, net, quantiser, x, tmp_path):
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(quantised(net, quantiser), tmp_path, config=strict_config(tmp_path))
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("quantiser", ["nf4", "nf4-double", "fp4", "hqq"], indirect=True)
def test_an_adapter_of_the_float_model_warns_on_a_4_bit_base_or_is_refused(net, base, train, tmp_path):
    train(get_peft_model(copy.deepcopy(net), config())).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"2 of 2 layers differ, most in `fc[12]`.*in the same precision and quantis"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with pytest.raises(ValueError, match=r"2 of 2 layers differ, most in `fc[12]`"):
        PeftModel.from_pretrained(base, tmp_path, config=strict_config(tmp_path))


def strict_config(path):
    config = SVDScaleShiftConfig.from_pretrained(path)
    config.strict = True
    return config


# Merging


def test_unmerging_gives_every_bit_back(model, base, x):
    output, before = model(x), bits(*quantised_layers(base))
    model.merge_adapter(safe_merge=True)
    with pytest.raises(AssertionError):
        assert_same_bits(bits(*(layer.base_layer for layer in tuned_layers(model))), before)
    model.unmerge_adapter()
    assert torch.equal(model(x), output)
    assert_same_bits(bits(*quantised_layers(model.unload())), before)


@pytest.mark.parametrize("quantiser", ["nf4", "int8"], indirect=True)
def test_what_unmerging_brings_back_follows_the_model(model):
    model.merge_adapter()
    model.to(torch.bfloat16).train()
    model.unmerge_adapter()
    for layer in tuned_layers(model):
        assert layer.base_layer.bias.dtype is torch.bfloat16
        assert layer.base_layer.training


def test_a_merge_costs_no_more_than_quantising_the_weight_once(model, net, quantiser, x, relative_error):
    output = model(x)
    exact = [layer.get_base_weight() + layer.get_delta_weight("default") for layer in tuned_layers(model)]
    merged = model.merge_and_unload()
    plain = quantised(net, quantiser)
    assert [type(layer) for layer in merged.modules()] == [type(layer) for layer in plain.modules()]
    for name, weight in zip(("fc1", "fc2"), exact, strict=True):
        layer = merged.get_submodule(name)
        once = relative_error(weight_of(plain.get_submodule(name)), net.get_submodule(name).weight)
        assert relative_error(weight_of(layer), weight) < 1.2 * once
        assert torch.equal(layer.bias, plain.get_submodule(name).bias)
    assert relative_error(merged(x), output) < 3 * once


@pytest.mark.parametrize("quantiser", BITSANDBYTES, indirect=True)
def test_a_merge_loses_no_more_than_loras_does(model, base, relative_error):
    """For changes of the weight of one size."""
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False))
    errors = {}
    for ours, theirs in zip(tuned_layers(model), tuned_layers(lora), strict=True):
        size = ours.get_delta_weight("default").norm() / theirs.get_delta_weight("default").norm()
        theirs.lora_B["default"].weight.data *= size
        for layer in (ours, theirs):
            exact = weight_of(layer.base_layer) + layer.get_delta_weight("default")
            layer.merge()
            errors.setdefault(layer is ours, []).append(relative_error(weight_of(layer.base_layer), exact))
    assert sum(errors[True]) < 1.1 * sum(errors[False])


# transformers


def kbit_model(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=BitsAndBytesConfig(**options))


@pytest.fixture
def path_of_causal_lm(tmp_path):
    size = {"vocab_size": 32, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 2}
    language_model = OPTForCausalLM(OPTConfig(num_hidden_layers=2, max_position_embeddings=16, init_std=0.2, **size))
    language_model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
    ids=["4bit", "8bit"],
)
def test_a_transformers_model_trains_with_gradient_checkpointing_saves_and_loads(options, path_of_causal_lm, tmp_path):
    tokens = torch.arange(2, 12).view(2, 5)
    checkpointing = {"use_gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    base = prepare_model_for_kbit_training(kbit_model(path_of_causal_lm, **options), **checkpointing)
    model = get_peft_model(base, SVDScaleShiftConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "fc1", "fc2"]))
    assert model.base_model.model.is_gradient_checkpointing
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 3 * 2
    optimizer = torch.optim.AdamW(trainable, lr=0.02)
    losses = []
    for _ in range(10):
        loss = model.train()(tokens, labels=tokens).loss
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    model.save_pretrained(tmp_path / "adapter")
    again = prepare_model_for_kbit_training(kbit_model(path_of_causal_lm, **options), **checkpointing)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter", config=strict_config(tmp_path / "adapter"))
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


# What cannot be had


@pytest.mark.parametrize("name", ["gptq", "awq", "aqlm", "eetq"])
def test_a_weight_that_cannot_be_read_back_is_refused_with_what_to_use_instead(name, net, monkeypatch):
    backend = ForwardOnlyQuantizationBackend(name)
    monkeypatch.setattr(svdtune.wrapping, "resolve_quantization_backend", lambda *args, **kwargs: backend)
    message = f"`fc1` cannot be tuned: a weight quantised by {name} cannot be read back.*bitsandbytes, HQQ or torchao"
    with pytest.raises(TypeError, match=message):
        get_peft_model(net, config())


@pytest.mark.parametrize("quantiser", [*BITSANDBYTES, "torchao"], indirect=True)
def test_a_quantised_parameter_is_refused(base):
    """Its numbers are codes, of which singular values say nothing."""
    with pytest.raises(TypeError, match=r"`fc1.weight` cannot be tuned: it is quantised.*`target_modules`"):
        get_peft_model(base, SVDScaleShiftConfig(target_modules=["fc2"], target_parameters=["fc1.weight"]))


# bitsandbytes' second format


@pytest.mark.skipif(not CPU_PACKS_4BIT, reason="only CPUs with AVX512-BF16 have this format")
@pytest.mark.parametrize("quantiser", ["nf4", "nf4-double"], indirect=True)
class TestFormatForEvaluation:
    """On such a CPU, the first forward in eval mode packs a 4-bit weight so that PEFT reads other numbers from it."""

    @pytest.fixture(autouse=True)
    def one_format_on_every_cpu(self):
        """Not here."""

    def test_evaluating_before_a_merge_and_before_saving_changes_nothing(
        self, net, quantiser, train, x, relative_error, tmp_path
    ):
        model = train(get_peft_model(quantised(net, quantiser), config()))
        exact = [layer.get_base_weight() + layer.get_delta_weight("default") for layer in tuned_layers(model)]
        with torch.no_grad():
            output = model.eval()(x)
            model.save_pretrained(tmp_path)
            assert torch.equal(model(x), output)
        model.merge_adapter()
        for layer, weight in zip(tuned_layers(model), exact, strict=True):
            assert relative_error(weight_of(layer.base_layer), weight) < 0.12

    def test_a_base_that_was_evaluated_before_is_refused(self, net, quantiser, x):
        base = quantised(net, quantiser)
        base(x)
        with pytest.raises(ValueError, match=r"`fc1` cannot be tuned: .*evaluat"):
            get_peft_model(base, config())
