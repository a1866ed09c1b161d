"""Modules that read the weight of a tuned layer instead of calling it get W' with its gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration, WavLMConfig, WavLMModel

from svdtune import SVDScaleShiftConfig
from svdtune.reading import WeightToRead


class Reader(nn.Module):
    """Reads two weights, and gives the first to an autograd function of its own."""

    def __init__(self):
        super().__init__()
        self.linear, self.tokens = nn.Linear(12, 8), nn.Embedding(5, 8)

    def forward(self, x):
        return Product.apply(x, self.linear.weight) @ self.tokens.weight.mT


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.mT @ x


def reader(dtype, train, **choices):
    config = SVDScaleShiftConfig(target_modules=["linear", "tokens"], **choices)
    return train(get_peft_model(Reader().to(dtype), config))


@pytest.mark.parametrize("choices", [{}, {"one_sided": True}, {"rank": 3}], ids=str)
def test_a_weight_that_is_read_is_the_papers_and_has_its_gradient(choices, dtype, train, paper_weight, relative_error):
    model = reader(dtype, train, **choices)
    net, x = model.base_model.model, torch.randn(6, 12).to(dtype)
    y = model(x)
    gradients = torch.autograd.grad(y.float().square().sum(), [p for p in model.parameters() if p.requires_grad])

    exact, weights = [], []
    for layer in (net.linear, net.tokens):
        base = layer.get_base_layer().weight
        values = torch.ones(min(base.shape)).double(), torch.zeros(min(base.shape)).double()
        learned = [
            value[:count].copy_(given["default"].detach()).requires_grad_()
            for value, given in zip(values, (layer.svd_scale_shift_scale, layer.svd_scale_shift_shift), strict=True)
            if (count := len(given["default"]))
        ]
        whole = [torch.cat([one, value[len(one) :]]) for one, value in zip(learned, values, strict=True)]
        exact += learned
        weights.append(paper_weight(base, *whole))
    expected = x.double() @ weights[0].T @ weights[1].T
    precision = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(y, expected) < precision
    for actual, right in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert relative_error(actual, right) < precision

    merged = copy.deepcopy(model).merge_and_unload()
    assert relative_error(merged(x), expected) < precision
    with model.disable_adapter():
        assert model.base_model.model.linear.weight is net.linear.get_base_layer().weight


def test_asking_for_dtype_and_shape_computes_nothing(train):
    layer = reader(torch.bfloat16, train).base_model.model.linear
    layer.changed_weight = None  # so that computing would fail
    weight = layer.weight
    assert (weight.dtype, weight.shape, weight.device.type) == (torch.bfloat16, (8, 12), "cpu")
    assert isinstance(weight, WeightToRead) and weight.requires_grad


def test_a_weight_that_is_read_cannot_be_written(train):
    layer = reader(torch.float32, train).base_model.model.linear
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot change the weight .* `base_layer\.weight`"):
        layer.weight.mul_(2)


def test_a_reading_model_compiles_into_one_graph(train, relative_error):
    model, x = reader(torch.float32, train), torch.randn(6, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    for actual, expected in zip(
        torch.autograd.grad(compiled(x).square().sum(), learned),
        torch.autograd.grad(model(x).square().sum(), learned),
        strict=True,
    ):
        assert relative_error(actual, expected) < 1e-5


def test_a_mixed_batch_refuses_to_be_read(train):
    model = reader(torch.float32, train).eval()
    with pytest.raises(ValueError, match="reads the weight of a tuned layer"):
        model(torch.randn(2, 12), adapter_names=["default", "__base__"])


def wavlm():
    return WavLMModel(
        WavLMConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8,),
            conv_kernel=(10,),
            conv_stride=(5,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            initializer_range=0.2,
        )
    )


def mamba():
    return MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, initializer_range=0.3)
    )


READERS = {
    "WavLM's attention": (wavlm, ["q_proj", "out_proj"], lambda: (torch.randn(1, 200),)),
    "Mamba's convolution": (mamba, ["conv1d", "x_proj", "out_proj"], lambda: (torch.arange(3, 15)[None],)),
    "nn.TransformerEncoderLayer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)),
        ["linear1", "linear2", "out_proj"],
        lambda: (torch.randn(2, 5, 12),),
    ),
}


@pytest.mark.parametrize("kind", READERS)
def test_models_that_read_are_tuned_and_merge_alike(kind, train, relative_error):
    make, targets, inputs = READERS[kind]
    model = train(get_peft_model(make().eval(), SVDScaleShiftConfig(target_modules=targets)))
    x = inputs()
    with_gradient = model(*x)
    with torch.no_grad():  # nn.TransformerEncoderLayer takes another path then
        y = model(*x)
        with model.disable_adapter():
            base = model(*x)
    tensors = [output if isinstance(output, torch.Tensor) else output[0] for output in (with_gradient, y, base)]
    tensors[0].square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
    merged = model.merge_and_unload()(*x)
    merged = merged if isinstance(merged, torch.Tensor) else merged[0]
    assert relative_error(tensors[1], merged) < 1e-5 and relative_error(tensors[0], merged) < 1e-5
    assert relative_error(tensors[2], merged) > 0.05


def test_an_embedding_is_tuned_wherever_it_stands_under_another_name(train, relative_error, tmp_path):
    """T5's `shared` is the embedding of its encoder and decoder, in modules of their own."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model = train(get_peft_model(copy.deepcopy(base), SVDScaleShiftConfig(target_modules=["shared"]))).eval()
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        y = model(input_ids=tokens, labels=tokens).logits
        assert relative_error(base(input_ids=tokens, labels=tokens).logits, y) > 0.05
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(loaded(input_ids=tokens, labels=tokens).logits, y)
        merged = model.merge_and_unload()
        assert relative_error(merged(input_ids=tokens, labels=tokens).logits, y) < 1e-5
    assert merged.encoder.embed_tokens.weight is merged.shared.weight
