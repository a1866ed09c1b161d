"""Parameters that their module reads directly: attention projections and the fused weights of experts."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import MixtralConfig, MixtralForCausalLM

from svdtune import SVDScaleShiftConfig


class Experts(nn.Module):
    """Three experts in one parameter, and a router that is another."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 12))
        self.router = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        gates = (x @ self.router.T).softmax(-1)
        return torch.einsum("bi,eio,be->bo", x, self.experts, gates)


ATTENTION = {"target_modules": ["self_attn"]}
EXPERTS = {"target_modules": [], "target_parameters": ["0.experts", "0.router"]}
CASES = {
    # what is tuned: (groups, rank) of each parameter
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)).eval(),
        ATTENTION,
        torch.randn(2, 5, 12),
        {"0.self_attn.in_proj_weight": 3, "0.self_attn.out_proj.weight": 1},
    ),
    "experts": (
        lambda: nn.Sequential(Experts()).eval(),
        EXPERTS,
        torch.randn(5, 8),
        {"0.experts": 3, "0.router": 1},
    ),
}
each_case = pytest.mark.parametrize("make_base, targets, x, groups", CASES.values(), ids=CASES)


def wrappers(model):
    return {m.parameter_name: m for m in model.modules() if type(m).__name__ == "ParamWrapper"}


def papers_model(base, model, paper_weight, groups):
    """The base model's parameters, with those that are tuned as the paper's formula has them."""
    parameters = {name: parameter.detach().double() for name, parameter in base.named_parameters()}
    for name, count in groups.items():
        layer = wrappers(model)[name.removeprefix("0.").removeprefix("self_attn.")]
        vectors = layer.svd_scale_shift_scale["default"], layer.svd_scale_shift_shift["default"]
        stacked = parameters[name].reshape(-1, parameters[name].shape[-1])
        parameters[name] = paper_weight(stacked, *vectors, count).reshape(parameters[name].shape)
    return parameters


@each_case
def test_output_and_merged_weight_are_the_papers_formula(
    make_base, targets, x, groups, train, paper_weight, relative_error
):
    base = make_base()
    model = train(get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(**targets))).eval()
    parameters = papers_model(base, model, paper_weight, groups)
    expected = functional_call(copy.deepcopy(base).double(), parameters, (x.double(),))
    # Without gradients, in eval mode, nn.TransformerEncoderLayer has a path that does not call its attention.
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            assert relative_error(model(x), expected) < 1e-5
    assert relative_error(base(x), expected) > 0.05

    original = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert relative_error(model(x), expected) < 1e-5
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.items())
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    for name in groups:
        assert relative_error(merged.get_parameter(name), parameters[name]) < 1e-5


@each_case
def test_gradients_reach_scale_and_shift_and_nothing_else(make_base, targets, x, groups, train):
    model = train(get_peft_model(make_base(), SVDScaleShiftConfig(**targets)))
    model(x).square().sum().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(learned) == 4
    assert all("svd_scale_shift" in name and model.get_parameter(name).grad.abs().sum() > 0 for name in learned)


@each_case
def test_adapters_are_saved_loaded_added_and_disabled(make_base, targets, x, groups, train, tmp_path):
    base = make_base()
    model = train(get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(**targets))).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    # Close and not equal: torch takes a fused path for untuned attention, which some processors round otherwise.
    torch.testing.assert_close(loaded(x), model(x))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))

    model.add_adapter("other", SVDScaleShiftConfig(**targets))
    first = model(x)
    train(model, "other").set_adapter("other")
    assert not torch.allclose(model(x), first)
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    assert all(layer.rank.keys() == {"default", "other"} for layer in wrappers(model).values())
    assert len(wrappers(model)) == 2
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(x, adapter_names=["other"] * len(x))
    torch.testing.assert_close(model(x, adapter_names=["__base__"] * len(x)), base(x))
    torch.testing.assert_close(model.unload()(x), base(x))


@each_case
def test_an_untrained_adapter_is_the_identity_to_the_last_bit(make_base, targets, x, groups, dtype):
    base, x = make_base().to(dtype), x.to(dtype)
    with torch.enable_grad():
        assert torch.equal(get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(**targets))(x), base(x))


def test_the_experts_of_a_transformers_model_are_tuned(train):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, vocab_size=40, initializer_range=0.2)
    base, tokens = MixtralForCausalLM(config).eval(), torch.randint(0, 40, (2, 6))
    expected = base(tokens).logits
    choices = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = get_peft_model(base, SVDScaleShiftConfig(**choices))
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * (16 + 16)
    torch.testing.assert_close(model(tokens).logits, expected)
    output = train(model)(tokens).logits
    assert not torch.allclose(output, expected, atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, output, rtol=0, atol=1e-4)


def test_an_attention_with_separate_projections_says_what_to_name_instead():
    attention = nn.Sequential(nn.MultiheadAttention(12, 3, kdim=8, vdim=8))
    with pytest.raises(TypeError, match="Name `q_proj_weight`, `k_proj_weight` and `v_proj_weight`"):
        get_peft_model(attention, SVDScaleShiftConfig(target_modules=["0"]))
    model = get_peft_model(attention, SVDScaleShiftConfig(target_modules=[], target_parameters=["0.q_proj_weight"]))
    assert model.get_nb_trainable_parameters()[0] == 24


def test_a_parameter_that_is_not_a_stack_of_matrices_is_refused_by_name():
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"`0\.weight` cannot be tuned: its parameter weight has 1 dimensions"):
        get_peft_model(model, SVDScaleShiftConfig(target_modules=[], target_parameters=["0.weight"]))


@each_case
def test_threads_answer_as_one_does(make_base, targets, x, groups, train):
    model = train(get_peft_model(make_base(), SVDScaleShiftConfig(**targets))).eval()
    inputs = [x + number for number in range(4)]
    with torch.no_grad():
        expected = [model(one) for one in inputs]

    def answers(one):
        with torch.no_grad():
            return [model(one) for _ in range(40)]

    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(answers, inputs), expected, strict=True):
            for answer in found:
                torch.testing.assert_close(answer, right)


def test_whoever_reads_a_tuned_parameter_from_outside_gets_what_its_module_computes_with(train, paper_weight):
    model = train(get_peft_model(nn.Sequential(Experts()), SVDScaleShiftConfig(**EXPERTS)))
    base = model.base_model.model[0].get_base_layer()
    layer = wrappers(model)["router"]
    vectors = layer.svd_scale_shift_scale["default"], layer.svd_scale_shift_shift["default"]
    read = model.base_model.model[0].router
    torch.testing.assert_close(read.double(), paper_weight(base.router, *vectors))
    assert read.requires_grad and base.router is not read
